"""All weights of the denoiser train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simpletuner.adapters.folder import trained_groups, verify_folder, write_folder
from simpletuner.adapters.named import named_weights
from simpletuner.core.errors import ConfigError

if TYPE_CHECKING:
    from simpletuner.adapters.method import Verified
    from simpletuner.adapters.settings import AdapterSettings
    from simpletuner.core.types import Batch, Draw, ParamGroup
    from simpletuner.models.family import Family


def attach(denoiser: nn.Module, family: Family, settings: AdapterSettings) -> Full:
    """Let every weight of `denoiser` that can learn train, in the dtype it is in.

    With trainable_models only what that names; with ``layer_freeze_strategy`` bitfit of it only the
    biases (Ben Zaken et al. 2022, arXiv 2106.10199).

    Raises:
        ConfigError: A name that nothing matches, or nothing that has biases.
    """
    biases = settings.layer_freeze_strategy == "bitfit"
    every, unused = dict(denoiser.named_parameters()), family.unused(denoiser)
    weights = named_weights(denoiser, family, settings) or every
    for name, parameter in every.items():
        chosen = name in weights and (name.endswith(".bias") or not biases)
        parameter.requires_grad_(chosen and name not in unused)
    named = settings.trainable_models if every.keys() - unused != weights.keys() - unused else None
    full = Full(denoiser, family, biases, named or ())
    if named and not full.parameters():
        raise ConfigError(
            f"trainable_models: nothing of {', '.join(named)} has a bias, and"
            " layer_freeze_strategy bitfit trains these alone",
            fix="remove one of the two",
        )
    return full


@dataclass(frozen=True)
class Full:
    """A denoiser that trains as a whole, or named parts of it; implements Trainable."""

    denoiser: nn.Module
    family: Family
    biases: bool = False
    named: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """See Trainable."""
        return (self.denoiser,)

    @property
    def file(self) -> str:
        """See Trainable."""
        return self.family.denoiser

    @property
    def summary(self) -> str:
        """See Trainable."""
        whole = f"the {self.file}" if self.biases else f"the whole {self.file}"
        what = f"{', '.join(self.named)} of the {self.file}" if self.named else whole
        return f"full, {'the biases of ' * self.biases}{what}"

    @property
    def facts(self) -> Mapping[str, str]:
        """See Trainable."""
        return {}

    def usage(self, base: str, root: Path) -> list[str]:
        """See Trainable."""
        cls, part = type(self.denoiser).__name__, self.file
        return [
            "import torch",
            f"from diffusers import DiffusionPipeline, {cls}",
            f'{part} = {cls}.from_pretrained("{root / part}", torch_dtype=torch.bfloat16)',
            f'pipe = DiffusionPipeline.from_pretrained("{base}", {part}={part},'
            " torch_dtype=torch.bfloat16)",
        ]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every weight that trains, by its name in the denoiser."""
        return {name: p for name, p in self.denoiser.named_parameters() if p.requires_grad}

    def groups(self) -> list[ParamGroup]:
        """See Trainable."""
        return trained_groups(self.parameters())

    def predict(self, family: Family, draw: Draw, batch: Batch) -> Tensor:
        """See Trainable."""
        return family.predict(self.denoiser, draw, batch)

    def open_sampler(self, family: Family, vae: nn.Module) -> Any:
        """See Trainable."""
        return family.open_sampler(self.denoiser, vae)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """See Trainable: the base is read anew, and what trains waits in the CPU's memory."""
        kept = {name: p.detach().to("cpu", copy=True) for name, p in self.parameters().items()}
        dtype = next(iter(kept.values())).dtype
        base = dict(self.family.checkpoint.open_part(self.file, dtype).named_parameters())
        self._set(base)
        del base
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters().items():
            parameter.copy_(values[name])

    def export(self, folder: Path, metadata: Mapping[str, str]) -> list[Path]:
        """Write the denoiser as a folder in diffusers' layout, in the dtype it trains in."""
        write_folder(self.denoiser, folder / self.file, metadata)
        return [folder / self.file]

    def verify(self, file: Path) -> Verified:
        """See Trainable.

        Raises:
            TrainingError: A tensor is missing, extra, or another.
        """
        return verify_folder(self.denoiser, file)
