"""LoRA files in the diffusers layout.

Rank and alpha stand in the header, where the stock loader reads them: without it, it takes alpha =
rank and is wrong in silence.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    write_tensors(path, tensors, header)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; the same tensors and metadata are the same bytes.

    Args:
        tensors: Contiguous, of the CPU.

    Raises:
        OSError: The disk refused.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def save(temporary: Path) -> None:
        try:
            save_file(dict(tensors), temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        _sort_metadata(temporary)

    write_through(path, save)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order: the library writes it in a random one."""
    with path.open("rb+") as handle:
        length = int.from_bytes(handle.read(8), "little")
        found = json.loads(handle.read(length))
        metadata = found.pop("__metadata__", {})
        sorted_ = {"__metadata__": dict(sorted(metadata.items())), **found} if metadata else found
        text = json.dumps(sorted_, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:
            handle.seek(8)
            handle.write(text.ljust(length))


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


def lora_file(name: str) -> Path:
    """The file that `name` means: itself, or the LoRA in a folder of that name."""
    path = Path(name).expanduser()
    return path / LORA_FILE if path.is_dir() else path
