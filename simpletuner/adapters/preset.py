"""A LoRA that is fused into the base before anything trains beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from simpletuner.adapters.export import BESIDE, lora_file
from simpletuner.adapters.formats import read_changes
from simpletuner.core.errors import ConfigError
from simpletuner.core.tensors import header
from simpletuner.models.encoders import is_text

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.adapters.settings import AdapterSettings
    from simpletuner.models.family import Family, Shrink


def with_preset(settings: AdapterSettings, family: Family, then: Shrink) -> Shrink:
    """What is done to the denoiser before it goes to its device: `then`, after the preset LoRA."""
    if settings.preset_lora_path is None:
        return then
    name = settings.preset_lora_path

    def fuse_then(part: str, module: nn.Module, device: torch.device) -> None:
        fuse(module, name, family)
        then(part, module, device)

    return fuse_then


def fuse(denoiser: nn.Module, name: str, family: Family) -> None:
    """Add the LoRA of the file or folder `name` to the weights of `denoiser`, in fp32.

    Raises:
        ConfigError: There is no such file, or a module of it is none of the denoiser's.
        ModelError: It cannot be read, or is not a LoRA of this family's denoiser.
    """
    path = lora_file(name)
    modules = dict(denoiser.named_modules())
    changes = read_changes(path, type(family), family.names_of(denoiser))
    if any(is_text(place) for place in changes):
        raise ConfigError(
            f"preset_lora_path: {path.name} changes the text encoders too, and only the denoiser"
            " takes one",
            fix="name a LoRA of the denoiser alone, or remove it",
        )
    if beside := header(path).get(BESIDE):
        raise ConfigError(
            f"preset_lora_path: {path.name} was trained with {beside}, which is not fused",
            fix="name a LoRA without trainable_models, or remove it",
        )
    for place, change in changes.items():
        weight = getattr(modules.get(place), "weight", None)
        delta = change.delta()
        if weight is None or weight.flatten(1).shape != delta.shape:
            raise ConfigError(
                f"preset_lora_path: {path.name} does not fit: the model has no such {place}",
                fix="name a LoRA of this checkpoint's family and size, or remove it",
            )
        with torch.no_grad():
            weight.copy_(_changed(weight, delta, change.magnitude).view_as(weight))


def _changed(weight: Tensor, delta: Tensor, magnitude: Tensor | None) -> Tensor:
    """[out, in · …] fp32; with a magnitude [out] the rows get its lengths (DoRA)."""
    changed = weight.detach().float().flatten(1) + delta
    if magnitude is None:
        return changed
    return changed * (magnitude.float().flatten() / changed.norm(dim=1))[:, None]
