"""LoRA by peft: fp32 adapters beside a frozen base (Hu et al. 2021, arXiv 2106.09685).

The change of a module's weight is ``(alpha / rank) * B @ A``, A [rank, in], B [out, rank]; with
rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) the factor is ``alpha / sqrt(rank)``. DoRA (Liu et al.
2024, arXiv 2402.09353) gives the changed weight's rows the lengths of a trained vector [out].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simpletuner.adapters import export as export_files
from simpletuner.adapters.formats import read_changes, write_changes
from simpletuner.adapters.method import Verified
from simpletuner.adapters.settings import STARTS
from simpletuner.adapters.start import start
from simpletuner.core.errors import ConfigError, TrainingError
from simpletuner.core.tensors import read_tensors
from simpletuner.core.types import ParamGroup

if TYPE_CHECKING:
    from simpletuner.adapters.settings import AdapterSettings
    from simpletuner.core.types import Batch, Draw
    from simpletuner.models.family import Family

_ADAPTER = "default"
_START = "start"
_CHECK = "verify"


def attach(denoiser: nn.Module, family: Family, settings: AdapterSettings) -> LoRA:
    """Freeze `denoiser` and give its target modules an adapter each.

    Raises:
        ConfigError: A target that no module matches, or an `init_lora` that does not fit.
    """
    from peft import LoraConfig

    named = family.lora_target_sets.get(settings.flux_lora_target, family.lora_targets)
    targets = list(settings.peft_lora_target_modules or named)
    _check_targets(denoiser, targets)
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or settings.lora_rank,
        lora_dropout=settings.lora_dropout,
        init_lora_weights="gaussian" if settings.lora_init_type == "gaussian" else True,
        target_modules=targets,
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
    )
    denoiser.requires_grad_(False)
    denoiser.add_adapter(config, adapter_name=_ADAPTER)
    lora = LoRA(denoiser, family.denoiser, type(family), settings.lora_format)
    if settings.lora_init_type in STARTS:
        denoiser.add_adapter(config, adapter_name=_START)
        for layer in lora.layers().values():
            start(layer, _ADAPTER, _START, settings.lora_init_type)
        lora.activate()
    for layer in lora.layers().values():
        for parameter in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
            parameter.data = parameter.data.float()
    for parameter in lora.parameters().values():
        parameter.data = parameter.data.float()
    if settings.init_lora:
        lora.start_from(export_files.lora_file(settings.init_lora), type(family))
    return lora


def _check_targets(denoiser: nn.Module, targets: Sequence[str]) -> None:
    for target in targets:
        found = [
            module
            for name, module in denoiser.named_modules()
            if name == target or name.endswith(f".{target}")
        ]
        if not found:
            raise ConfigError(
                f"peft_lora_target_modules: no module of the model is called {target!r}",
                fix="name modules by the end of their path, for example to_q or to_out.0",
            )
        strange = [module for module in found if not isinstance(module, (nn.Linear, nn.Conv2d))]
        if strange:
            raise ConfigError(
                f"peft_lora_target_modules: {target!r} is a {type(strange[0]).__name__},"
                " which has no weight matrix to adapt",
                fix="name linear layers or convolutions inside it, for example to_q or to_out.0",
            )


@dataclass(frozen=True)
class LoRA:
    """A denoiser with LoRA adapters; implements Trainable."""

    denoiser: nn.Module
    prefix: str
    family: type[Family]
    layout: str = "diffusers"

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """See Trainable."""
        return (self.denoiser,)

    @property
    def file(self) -> str:
        """See Trainable."""
        return export_files.LORA_FILE

    @property
    def summary(self) -> str:
        """See Trainable."""
        facts, kind = self.facts, "DoRA" if self._config.use_dora else "lora"
        return f"{kind}, rank {facts['lora_rank']}, alpha {facts['lora_alpha']}"

    @property
    def facts(self) -> Mapping[str, str]:
        """See Trainable."""
        return {"lora_rank": str(self._config.r), "lora_alpha": f"{self._config.lora_alpha:g}"}

    @property
    def _config(self) -> Any:
        return self.denoiser.peft_config[_ADAPTER]

    def usage(self, base: str, root: Path) -> list[str]:
        """See Trainable."""
        return [
            "from diffusers import DiffusionPipeline",
            f'pipe = DiffusionPipeline.from_pretrained("{base}")',
            f'pipe.load_lora_weights("{root}", weight_name="{self.file}")',
        ]

    def activate(self) -> None:
        """Let the adapters act and train, and what they started from act against them."""
        there = [name for name in (_ADAPTER, _START) if name in self.denoiser.peft_config]
        self.denoiser.set_adapter(there)
        for layer in self.layers().values():
            for held in (layer.lora_A, layer.lora_B):
                if _START in held:
                    held[_START].requires_grad_(False)

    def layers(self, adapter: str = _ADAPTER) -> dict[str, Any]:
        """The modules that carry `adapter`, by name."""
        from peft.tuners.lora import LoraLayer

        return {
            name: module
            for name, module in self.denoiser.named_modules()
            if isinstance(module, LoraLayer) and adapter in module.lora_A
        }

    def parameters(self) -> dict[str, nn.Parameter]:
        """What every module's adapter is made of, by its name in the exported file."""
        found: dict[str, nn.Parameter] = {}
        for name, layer in self.layers().items():
            found[f"{name}.lora_A.weight"] = layer.lora_A[_ADAPTER].weight
            found[f"{name}.lora_B.weight"] = layer.lora_B[_ADAPTER].weight
            if _ADAPTER in layer.lora_magnitude_vector:
                magnitude = layer.lora_magnitude_vector[_ADAPTER].weight
                found[f"{name}.lora_magnitude_vector"] = magnitude
        return found

    def change(self) -> dict[str, Tensor]:
        """What the file holds of every module: `parameters`, with what they started from taken off.

        fp32 on the CPU.
        """
        found = {name: p.detach().float().cpu() for name, p in self.parameters().items()}
        for name, layer in self.layers().items():
            if _START in layer.lora_A:
                down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
                first = [held[_START].weight.float().cpu() for held in (layer.lora_A, layer.lora_B)]
                found[down] = torch.cat((found[down], first[0]))
                found[up] = torch.cat((found[up], -first[1]), 1)
        return found

    def groups(self) -> list[ParamGroup]:
        """One group: every adapter decays and learns alike."""
        return [ParamGroup("lora", self.parameters())]

    def predict(self, family: Family, draw: Draw, batch: Batch) -> Tensor:
        """See Trainable."""
        return family.predict(self.denoiser, draw, batch)

    def open_sampler(self, family: Family, vae: nn.Module) -> Any:
        """See Trainable."""
        return family.open_sampler(self.denoiser, vae)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """See Trainable."""
        if all(layer.disable_adapters for layer in self.layers().values()):
            yield  # another context holds them off, and lets go of them
            return
        self.denoiser.disable_adapters()
        try:
            yield
        finally:
            self.denoiser.enable_adapters()

    def export(self, folder: Path, metadata: Mapping[str, str]) -> list[Path]:
        """Write ``pytorch_lora_weights.safetensors`` in the diffusers layout, then in another's."""
        tensors = {
            f"{self.prefix}.{name}": tensor.contiguous() for name, tensor in self.change().items()
        }
        first = next(iter(self.layers().values()))
        scale, rank = first.scaling[_ADAPTER], first.r[_ADAPTER] * (1 + (_START in first.lora_A))
        config = self._config.to_dict()
        config |= {"r": rank, "lora_alpha": scale * rank, "use_rslora": False}
        config["init_lora_weights"] = True
        path = folder / export_files.LORA_FILE
        export_files.write_lora(path, tensors, self.prefix, config, metadata)
        if self.layout == "diffusers":
            return [path]
        other = path.with_name(f"{path.stem}.{self.layout}.safetensors")
        names = self.family.names_of(self.denoiser)
        changes = read_changes(path, self.family, names)
        write_changes(other, changes, self.layout, self.family, metadata, names)
        return [path, other]

    def start_from(self, path: Path, family: type[Family]) -> None:
        """Copy a LoRA in any layout into these adapters.

        Raises:
            ConfigError: There is no such file, or its modules, rank, alpha or kind are not these.
            ModelError: It cannot be read, or is not a LoRA of this denoiser.
        """
        names = family.names_of(self.denoiser)
        changes, ours = read_changes(path, family, names), self.layers()
        strange = sorted(set(changes) ^ set(ours))
        what = f"{len(strange)} modules differ, for example {strange[0]}" if strange else None
        for name, change in changes.items() if what is None else ():
            scale, mine = change.alpha / change.rank, ours[name].scaling[_ADAPTER]
            if change.rank != ours[name].r[_ADAPTER]:
                what = f"{name} has another rank, {change.rank}"
            elif abs(scale - mine) > 1e-6:
                what = f"its alpha / rank is {scale:g}, yours is {mine:g}"
            elif (change.magnitude is None) == (_ADAPTER in ours[name].lora_magnitude_vector):
                what = "one of the two is a DoRA, the other a plain LoRA"
        if what is not None:
            raise ConfigError(
                f"init_lora: {path.name} does not fit: {what}",
                fix="set lora_rank, lora_alpha, use_dora, peft_lora_target_modules to the file's",
            )
        trained = self.parameters()
        with torch.no_grad():
            for name, change in changes.items():
                trained[f"{name}.lora_A.weight"].copy_(change.down)
                trained[f"{name}.lora_B.weight"].copy_(change.up)
                if change.magnitude is not None:
                    trained[f"{name}.lora_magnitude_vector"].copy_(change.magnitude)

    def verify(self, file: Path) -> Verified:
        """Load `file` with the stock loader as a second adapter and compare module by module.

        The stock loader casts to the base's dtype, so the change is computed in fp32 from the
        file's tensors with the modules and the scale the loader gave them; what it loaded must be
        those tensors in its dtype.

        Raises:
            TrainingError: A module is missing, extra, or changed by more than 1e-6.
        """
        state = read_tensors(file)
        # the stock pipelines' own path for one component (load_lora_weights calls it)
        self.denoiser.load_lora_adapter(
            dict(state),
            prefix=self.prefix,
            adapter_name=_CHECK,
            metadata=export_files.adapter_metadata(file),
        )
        try:
            return self._compare(state, file)
        finally:
            self.denoiser.delete_adapters(_CHECK)
            self.activate()

    def _compare(self, state: Mapping[str, Tensor], file: Path) -> Verified:
        ours, theirs, change = self.layers(), self.layers(_CHECK), self.change()
        wrong = sorted(set(ours) ^ set(theirs))
        wrong += sorted(set(state) ^ {f"{self.prefix}.{name}" for name in change})
        largest = 0.0
        for name in ours.keys() & theirs.keys():
            held = {part: change.get(f"{name}.{part}") for part in _PARTS}
            filed = {part: state.get(f"{self.prefix}.{name}.{part}") for part in _PARTS}
            error = _difference(held, filed, theirs[name], ours[name].scaling[_ADAPTER])
            largest = max(largest, error)
            if not error <= 1e-6:
                wrong.append(name)
        if wrong:
            raise TrainingError(
                f"{file.name} was written, but the stock loader reads back another model:"
                f" {len(wrong)} modules differ, for example {wrong[0]}",
                fix="keep the last checkpoint and report this: the file must not be used",
            )
        return Verified(len(ours), len(ours) - len(wrong), largest)


_PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


def _difference(
    held: Mapping[str, Tensor | None], filed: Mapping[str, Tensor | None], other: Any, scale: float
) -> float:
    """The largest difference of the two changes of a module, relative to the largest entry of mine.

    Args:
        held: What training has, by _PARTS.
        filed: What the file has.
        other: The module as the stock loader made it of the file.
        scale: Of mine.
    """
    loaded = (other.lora_A, other.lora_B, other.lora_magnitude_vector)
    for part, modules in zip(_PARTS, loaded, strict=True):
        mine, theirs = held[part], filed[part]
        if mine is None and theirs is None:
            continue
        if mine is None or theirs is None or _CHECK not in modules:
            return float("inf")
        weight = modules[_CHECK].weight.cpu()
        if not torch.equal(weight, theirs.to(weight.dtype)) or not torch.equal(mine, theirs):
            return float("inf")
    products = []
    for tensors, factor in ((held, scale), (filed, other.scaling[_CHECK])):
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
        if a is None or b is None:
            return float("inf")
        products.append(b.float().flatten(1) @ a.float().flatten(1) * factor)
    trained, reloaded = products
    largest = max(trained.abs().max().item(), 1e-12)
    return float((trained - reloaded).abs().max().item()) / largest
