"""A module as a folder in diffusers' layout: written, read back, compared."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simpletuner.adapters.method import Verified
from simpletuner.core.errors import TrainingError
from simpletuner.core.tensors import write_tensors
from simpletuner.core.types import ParamGroup

if TYPE_CHECKING:
    from torch import nn

_WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_folder(module: nn.Module, place: Path, metadata: Mapping[str, str]) -> None:
    """Write `module` as the folder `place`, in the dtype it is in; what was there is gone."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    module.save_config(place)  # type: ignore[operator]
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()
    }
    write_tensors(place / _WEIGHTS, tensors, {"format": "pt", **metadata})


def verify_folder(module: nn.Module, place: Path) -> Verified:
    """Open the folder with the stock loader and compare every tensor with those of `module`.

    Raises:
        TrainingError: One is missing, extra, or another.
    """
    ours = module.state_dict()
    dtype = next(module.parameters()).dtype
    stock = type(module).from_pretrained(place, dtype=dtype)  # type: ignore[attr-defined]
    theirs: Mapping[str, Tensor] = stock.state_dict()
    wrong = sorted(ours.keys() ^ theirs.keys())
    wrong += [
        name
        for name in sorted(ours.keys() & theirs.keys())
        if not torch.equal(ours[name].cpu(), theirs[name])
    ]
    if wrong:
        raise TrainingError(
            f"{place.name} was written, but the stock loader reads back another model:"
            f" {len(wrong)} tensors differ, for example {wrong[0]}",
            fix="keep the last checkpoint and report this: the folder must not be used",
        )
    modules = {name.rpartition(".")[0] for name in ours}
    return Verified(len(modules), len(modules), 0.0)


def trained_groups(parameters: Mapping[str, nn.Parameter]) -> list[ParamGroup]:
    """Matrices and kernels decay; biases and the scales of norms do not."""
    matrices = {name: p for name, p in parameters.items() if p.ndim > 1}
    vectors = {name: p for name, p in parameters.items() if p.ndim <= 1}
    groups = [ParamGroup("matrices", matrices), ParamGroup("vectors", vectors, decay=False)]
    return [group for group in groups if group.parameters]
