"""LoRA files in the diffusers layout.

Rank and alpha stand in the header, where the stock loader reads them: without it, it takes alpha =
rank and is wrong in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.core.errors import ConfigError, ModelError
from simpletuner.core.files import write_through

if TYPE_CHECKING:
    from torch import Tensor

LORA_FILE = "pytorch_lora_weights.safetensors"
_HEADER = "lora_adapter_metadata"


def write_lora(
    path: Path,
    tensors: Mapping[str, Tensor],
    prefix: str,
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> None:
    """Write a LoRA file atomically.

    Args:
        tensors: ``<prefix>.<module>.lora_A.weight`` and ``lora_B``, contiguous.
        config: peft's own description of the adapter.
        metadata: Facts for the reader; no paths, no secrets.
    """
    from safetensors.torch import save_file

    adapter = {
        f"{prefix}.{key}": sorted(value) if isinstance(value, set) else value
        for key, value in config.items()
        if key not in ("base_model_name_or_path", "auto_mapping")
    }
    header = {
        "format": "pt",
        _HEADER: json.dumps(adapter, indent=2, sort_keys=True),
        "ss_network_dim": str(config["r"]),
        "ss_network_alpha": f"{config['lora_alpha']:g}",
        **metadata,
    }
    write_through(path, lambda temporary: save_file(dict(tensors), temporary, metadata=header))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, copied out of the mapping."""
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        return dict(handle.metadata() or {})


def adapter_metadata(path: Path) -> dict[str, Any] | None:
    """Peft's description of the adapter, as the stock pipelines pass it on; None if absent."""
    found = header(path).get(_HEADER)
    return json.loads(found) if found else None


def read_lora(path: Path, prefix: str) -> tuple[dict[str, Tensor], float]:
    """A LoRA's tensors without `prefix`, and its alpha / rank.

    Raises:
        ConfigError: There is no such file.
        ModelError: It is not a LoRA in the diffusers layout.
    """
    if not path.is_file():
        raise ConfigError(f"init_lora: {path} does not exist")
    tensors = {
        name.removeprefix(f"{prefix}."): tensor
        for name, tensor in read_tensors(path).items()
        if name.startswith(f"{prefix}.") and (".lora_A." in name or ".lora_B." in name)
    }
    if not tensors:
        raise ModelError(
            f"{path.name} is not a LoRA in the diffusers layout for this model",
            fix="convert it first, or name pytorch_lora_weights.safetensors of a run",
        )
    facts = adapter_metadata(path) or {}
    rank = facts.get(f"{prefix}.r")
    return tensors, (facts[f"{prefix}.lora_alpha"] / rank if rank else 1.0)
