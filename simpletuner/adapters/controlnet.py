"""A ControlNet trains beside the frozen denoiser (Zhang et al. 2023, arXiv 2302.05543)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simpletuner.adapters.folder import trained_groups, verify_folder, write_folder
from simpletuner.models.control import PART, open_beside
from simpletuner.models.loading import controlnet_folder

if TYPE_CHECKING:
    from simpletuner.adapters.method import Verified
    from simpletuner.adapters.settings import AdapterSettings
    from simpletuner.core.types import Batch, Draw, ParamGroup
    from simpletuner.models.family import Family


def check(family: Family, settings: AdapterSettings) -> None:
    """Refuse what no net can train beside, before anything is encoded; fetches one that is named.

    Does nothing where the settings ask for no net.

    Raises:
        ConfigError: The model takes none, or not this one.
        ModelError: It is not there.
    """
    if settings.controlnet:
        family.check_control(*_named(settings))


def _named(settings: AdapterSettings) -> tuple[Path | None, str]:
    """The folder of the net to go on from, and what the user calls it."""
    name = settings.controlnet_model_name_or_path
    return (controlnet_folder(name), name) if name else (None, "")


def attach(denoiser: nn.Module, family: Family, settings: AdapterSettings) -> Controlled:
    """Freeze `denoiser` and put a ControlNet beside it: a new one, or the one the user named.

    Raises:
        ConfigError: The model takes none, or not this one.
        ModelError: It is not there, or cannot be read.
    """
    net = open_beside(family, *_named(settings))
    denoiser.requires_grad_(False)
    unused = family.unused(net)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in unused)
    return Controlled(denoiser, net.to(next(denoiser.parameters()).device).train(), family)


@dataclass(frozen=True)
class Controlled:
    """A frozen denoiser and the ControlNet that trains beside it, fp32; implements Trainable."""

    denoiser: nn.Module
    net: nn.Module
    family: Family

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """See Trainable."""
        return self.denoiser, self.net

    @property
    def file(self) -> str:
        """See Trainable."""
        return PART

    @property
    def summary(self) -> str:
        """See Trainable."""
        return f"controlnet, a whole {type(self.net).__name__}"

    @property
    def facts(self) -> Mapping[str, str]:
        """See Trainable."""
        return {}

    def usage(self, base: str, root: Path) -> list[str]:
        """See Trainable."""
        assert self.family.control is not None, "a net was opened for this family"
        cls, pipeline = type(self.net).__name__, self.family.control.pipeline
        return [
            "import torch",
            f"from diffusers import {cls}, {pipeline}",
            f'{PART} = {cls}.from_pretrained("{root / PART}", torch_dtype=torch.bfloat16)',
            f'pipe = {pipeline}.from_pretrained("{base}", {PART}={PART},'
            " torch_dtype=torch.bfloat16)",
            f'image = pipe("…", {self.family.control.argument}=control_picture).images[0]',
        ]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every weight of the net that trains, by its name in it."""
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}

    def groups(self) -> list[ParamGroup]:
        """See Trainable."""
        return trained_groups(self.parameters())

    def predict(self, family: Family, draw: Draw, batch: Batch) -> Tensor:
        """`family.predict` with what the net makes of the batch's control pictures."""
        residuals = family.residuals(self.net, draw, batch)
        return family.predict(self.denoiser, draw, batch, residuals)

    def open_sampler(self, family: Family, vae: nn.Module) -> Any:
        """See Trainable: the stock pipeline that takes a control picture."""
        return family.open_sampler(self.denoiser, vae, self.net)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """See Trainable: the net adds nothing, whatever it makes of its inputs."""
        hook = self.net.register_forward_hook(lambda _net, _inputs, output: _zeros(output))
        try:
            yield
        finally:
            hook.remove()

    def export(self, folder: Path, metadata: Mapping[str, str]) -> list[Path]:
        """Write the net as a folder in diffusers' layout."""
        write_folder(self.net, folder / PART, metadata)
        return [folder / PART]

    def verify(self, file: Path) -> Verified:
        """See Trainable.

        Raises:
            TrainingError: A tensor is missing, extra, or another.
        """
        return verify_folder(self.net, file)


def _zeros(output: Any) -> Any:
    """Zeros in the place of each tensor; also of one that is not finite."""
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    return type(output)(_zeros(each) for each in output)
