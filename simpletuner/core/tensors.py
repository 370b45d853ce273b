"""Safetensors files: written whole or not at all, the same content the same bytes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.core.files import write_through

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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


def names_in(path: Path) -> list[str]:
    """The names of a safetensors file's tensors; reads its header only."""
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        return list(handle.keys())


def dtype_of(path: Path) -> torch.dtype:
    """What the numbers of a safetensors file are held in, by its first floating-point tensor."""
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        for name in handle.keys():
            tensor: Tensor = handle.get_tensor(name)
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32
