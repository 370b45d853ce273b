"""LoRA files in the diffusers layout.

Rank and alpha stand in the header, where the stock loader reads them: without it, it takes alpha =
rank and is wrong in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.core.tensors import header, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

LORA_FILE = "pytorch_lora_weights.safetensors"
BESIDE = "trained_beside"
"""In the header of a LoRA: the file of weights that trained whole beside it, in the same folder."""
_HEADER = "lora_adapter_metadata"


def write_lora(
    path: Path,
    tensors: Mapping[str, Tensor],
    configs: Mapping[str, Mapping[str, Any]],
    metadata: Mapping[str, str],
) -> None:
    """Write a LoRA file atomically.

    Args:
        tensors: ``<prefix>.<module>.lora_A.weight`` and ``lora_B``, contiguous.
        configs: peft's own description of each part's adapter, by its prefix, the denoiser first.
        metadata: Facts for the reader; no paths, no secrets.
    """
    adapter = {
        f"{prefix}.{key}": sorted(value) if isinstance(value, set) else value
        for prefix, config in configs.items()
        for key, value in config.items()
        if key not in ("base_model_name_or_path", "auto_mapping")
    }
    first = next(iter(configs.values()))
    header = {
        "format": "pt",
        _HEADER: json.dumps(adapter, indent=2, sort_keys=True),
        "ss_network_dim": str(first["r"]),
        "ss_network_alpha": f"{first['lora_alpha']:g}",
        **metadata,
    }
    write_tensors(path, tensors, header)


def adapter_metadata(path: Path) -> dict[str, Any] | None:
    """Peft's description of the adapter, as the stock pipelines pass it on; None if absent."""
    found = header(path).get(_HEADER)
    return json.loads(found) if found else None


def lora_file(name: str) -> Path:
    """The file that `name` means: itself, or the LoRA in a folder of that name."""
    path = Path(name).expanduser()
    return path / LORA_FILE if path.is_dir() else path
