"""All weights of the denoiser train."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from simpletuner.adapters.export import write_tensors
from simpletuner.adapters.method import Verified
from simpletuner.core.errors import TrainingError
from simpletuner.core.types import ParamGroup

if TYPE_CHECKING:
    from simpletuner.adapters.settings import AdapterSettings
    from simpletuner.core.types import Batch, Draw
    from simpletuner.models.family import Family

_WEIGHTS = "diffusion_pytorch_model.safetensors"


def attach(denoiser: nn.Module, family: Family, settings: AdapterSettings) -> Full:
    """Let every weight of `denoiser` that can learn train, in the dtype it is in."""
    unused = family.unused(denoiser)
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(name not in unused)
    return Full(denoiser, family)


@dataclass(frozen=True)
class Full:
    """A denoiser that trains as a whole; implements Trainable."""

    denoiser: nn.Module
    family: Family

    @property
    def file(self) -> str:
        """See Trainable."""
        return self.family.denoiser

    @property
    def summary(self) -> str:
        """See Trainable."""
        return f"full, the whole {self.file}"

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
        """Matrices and kernels decay; biases and the scales of norms do not."""
        parameters = self.parameters()
        matrices = {name: p for name, p in parameters.items() if p.ndim > 1}
        vectors = {name: p for name, p in parameters.items() if p.ndim <= 1}
        groups = [ParamGroup("matrices", matrices), ParamGroup("vectors", vectors, decay=False)]
        return [group for group in groups if group.parameters]

    def predict(self, family: Family, draw: Draw, batch: Batch) -> Tensor:
        """See Trainable."""
        return family.predict(self.denoiser, draw, batch)

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
        place = folder / self.file
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        self.denoiser.save_config(place)  # type: ignore[operator]
        tensors = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.denoiser.state_dict().items()
        }
        write_tensors(place / _WEIGHTS, tensors, {"format": "pt", **metadata})
        return [place]

    def verify(self, file: Path) -> Verified:
        """Open the folder with the stock loader and compare every tensor.

        Raises:
            TrainingError: One is missing, extra, or another.
        """
        ours = self.denoiser.state_dict()
        dtype = next(self.denoiser.parameters()).dtype
        stock = type(self.denoiser).from_pretrained(file, dtype=dtype)  # type: ignore[attr-defined]
        theirs: Mapping[str, Tensor] = stock.state_dict()
        wrong = sorted(ours.keys() ^ theirs.keys())
        wrong += [
            name
            for name in sorted(ours.keys() & theirs.keys())
            if not torch.equal(ours[name].cpu(), theirs[name])
        ]
        if wrong:
            raise TrainingError(
                f"{file.name} was written, but the stock loader reads back another model:"
                f" {len(wrong)} tensors differ, for example {wrong[0]}",
                fix="keep the last checkpoint and report this: the folder must not be used",
            )
        modules = {name.rpartition(".")[0] for name in ours}
        return Verified(len(modules), len(modules), 0.0)
