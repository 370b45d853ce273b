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


def read_lora(path: Path, prefix: str) -> tuple[dict[str, Tensor], float]:
    """A LoRA's tensors without `prefix`, and its alpha / rank.

    Raises:
        ConfigError: There is no such file.
        ModelError: It cannot be read, or is not a LoRA of the denoiser alone in the diffusers
            layout with its rank and alpha in the header.
    """
    from safetensors import SafetensorError

    if not path.is_file():
        raise ConfigError(f"init_lora: {path} does not exist")
    try:
        found, facts = read_tensors(path), adapter_metadata(path) or {}
    except (SafetensorError, ValueError) as error:
        raise ModelError(
            f"init_lora: {path.name} cannot be read: {error}", fix="copy or download it again"
        ) from error
    known = re.compile(rf"{re.escape(prefix)}\..+\.lora_[AB]\.weight")
    strange = sorted(name for name in found if not known.fullmatch(name))
    if strange or not found:
        raise ModelError(
            f"init_lora: {path.name} is not a LoRA of the {prefix} alone in the diffusers layout:"
            f" it holds {strange[0] if strange else 'nothing'}",
            fix="convert it first, or name pytorch_lora_weights.safetensors of a run",
        )
    if f"{prefix}.r" not in facts:
        raise ModelError(
            f"init_lora: {path.name} does not say its rank and alpha, so its strength is unknown",
            fix="save it again with a diffusers that writes lora_adapter_metadata",
        )
    scale = facts[f"{prefix}.lora_alpha"] / facts[f"{prefix}.r"]
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in found.items()}, scale
