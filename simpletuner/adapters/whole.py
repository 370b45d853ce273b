"""Weights of a denoiser that train whole beside adapters, and the file that holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from simpletuner.adapters.export import BESIDE
from simpletuner.adapters.folder import trained_groups
from simpletuner.core.errors import ConfigError
from simpletuner.core.tensors import header, read_tensors, write_tensors
from simpletuner.models.single_file import to_original

if TYPE_CHECKING:
    from simpletuner.core.types import ParamGroup
    from simpletuner.models.family import Family
    from simpletuner.models.original import OriginalNames


@dataclass(frozen=True)
class Whole:
    """Weights that train whole, in fp32; possibly none.

    Args:
        denoiser: Whose they are.
        part: Its name in the pipeline.
        parameters: They, by their names in it.
        base: What they were at first, on the CPU, in the dtype they were opened in.
    """

    denoiser: nn.Module
    part: str
    parameters: Mapping[str, nn.Parameter]
    base: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, denoiser: nn.Module, part: str, parameters: Mapping[str, nn.Parameter]) -> Whole:
        """Let `parameters` train.

        Raises:
            ConfigError: One of them is quantised.
        """
        for name, parameter in parameters.items():
            if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                raise ConfigError(
                    f"trainable_models: {name} is held in fewer bits by base_model_precision, and"
                    " only whole numbers of weights can move",
                    fix="leave it out, or set base_model_precision no_change",
                )
        base = {  # a blueprint has nothing to copy
            name: p.detach() if p.is_meta else p.detach().to("cpu", copy=True)
            for name, p in parameters.items()
        }
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
        found = cls(denoiser, part, parameters, base)
        found.learn()
        return found

    def learn(self) -> None:
        """Let them have gradients, which peft takes from all that is not its own."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def groups(self) -> list[ParamGroup]:
        """See Trainable."""
        return [replace(group, whole=True) for group in trained_groups(self.parameters)]

    @contextmanager
    def untrained(self) -> Iterator[None]:
        """The base in their place, as long as the context is open."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._set(self.base)
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    # --- the file ------------------------------------------------------------------------------

    @property
    def file(self) -> str:
        """What the file is called."""
        return f"{self.part}_weights.safetensors"

    @property
    def facts(self) -> dict[str, str]:
        """What stands in the header of the adapter's file, so that nobody takes it for all."""
        return {BESIDE: self.file} if self.parameters else {}

    def usage(self, root: Path) -> list[str]:
        """Lines of Python that load the file into a stock pipeline ``pipe``."""
        if not self.parameters:
            return []
        file = root / self.file
        return [
            "from safetensors.torch import load_file",
            f'pipe.{self.part}.load_state_dict(load_file("{file}"), strict=False)',
        ]

    def export(self, folder: Path, metadata: Mapping[str, str]) -> list[Path]:
        """Write them in fp32 by their names in the stock class; nothing where there are none."""
        if not self.parameters:
            return []
        tensors = {n: p.detach().cpu().contiguous() for n, p in self.parameters.items()}
        write_tensors(folder / self.file, tensors, {"format": "pt", **metadata})
        return [folder / self.file]

    def differing(self, folder: Path, family: Family) -> list[str]:
        """Names that the file in `folder` has otherwise than memory and the stock class."""
        if not self.parameters:
            return []
        filed = read_tensors(folder / self.file)
        stock = family.blueprint(torch.float32).state_dict()
        return sorted(filed.keys() ^ self.parameters.keys()) + [
            name
            for name in sorted(filed.keys() & self.parameters.keys())
            if name not in stock
            or stock[name].shape != filed[name].shape
            or not torch.equal(filed[name], self.parameters[name].detach().cpu())
        ]

    def start_from(self, adapter: Path) -> None:
        """Go on from the file beside an adapter that was trained with one.

        Raises:
            ConfigError: It is not there, or is of other weights.
        """
        name = header(adapter).get(BESIDE)
        if name is None:
            return
        file = adapter.with_name(name)
        if not file.is_file():
            raise ConfigError(
                f"init_lora: {adapter.name} was trained with {name}, which is not beside it",
                fix="put both files into one folder",
            )
        found = read_tensors(file)
        if strange := sorted(found.keys() ^ self.parameters.keys()):
            raise ConfigError(
                f"init_lora: {name} does not fit: {len(strange)} weights differ, for example"
                f" {strange[0]}",
                fix="set trainable_models to what was trained whole there",
            )
        self._set(found)

    def changes(self, names: OriginalNames) -> dict[str, Tensor]:
        """What ComfyUI adds: ``.diff`` to a module's weight, ``.diff_b`` to its bias.

        Args:
            names: The table of this denoiser.

        Returns:
            By ComfyUI's keys, fp32 on the CPU.

        Raises:
            ModelError: The original has no such weight.
        """
        moved = {n: p.detach().cpu() - self.base[n].float() for n, p in self.parameters.items()}
        found = {}
        for key, change in to_original({**self._unmoved(moved, names), **moved}, names).items():
            module, _, leaf = key.rpartition(".")
            end = {"weight": f"{module}.diff", "bias": f"{module}.diff_b"}.get(leaf, f"{key}.diff")
            if bool(change.any()):
                found[f"diffusion_model.{end}"] = change.contiguous()
        return found

    def _unmoved(self, moved: Mapping[str, Tensor], names: OriginalNames) -> dict[str, Tensor]:
        """Zeros for what is in one matrix with one of `moved`, or decides how it is turned."""
        found = {}
        for name, change in moved.items():
            module, _, leaf = name.rpartition(".")
            place = names.place(module)
            if place is None:
                continue
            unit = len(change) // place.shares[place.part]
            for other, its in names.modules(place.module):
                rows = unit * place.shares[its.part]
                found[f"{other}.{leaf}"] = change.new_zeros(rows, *change.shape[1:])
            if place.swapped:
                weight = self.denoiser.get_submodule(module).get_parameter("weight")
                found[f"{module}.weight"] = torch.zeros(weight.shape)
        return found
