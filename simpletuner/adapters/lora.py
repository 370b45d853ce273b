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
from simpletuner.core.errors import ConfigError, TrainingError
from simpletuner.core.types import ParamGroup

if TYPE_CHECKING:
    from simpletuner.adapters.settings import AdapterSettings
    from simpletuner.core.types import Batch, Draw
    from simpletuner.models.family import Family

_ADAPTER = "default"
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
        init_lora_weights=True if settings.lora_init_type == "default" else settings.lora_init_type,
        target_modules=targets,
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
    )
    denoiser.requires_grad_(False)
    denoiser.add_adapter(config, adapter_name=_ADAPTER)
    lora = LoRA(denoiser, family.denoiser, type(family), settings.lora_format)
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

    def groups(self) -> list[ParamGroup]:
        """One group: every adapter decays and learns alike."""
        return [ParamGroup("lora", self.parameters())]

    def predict(self, family: Family, draw: Draw, batch: Batch) -> Tensor:
        """See Trainable."""
        return family.predict(self.denoiser, draw, batch)

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
            f"{self.prefix}.{name}": parameter.detach().float().cpu().contiguous()
            for name, parameter in self.parameters().items()
        }
        scale = next(iter(self.layers().values())).scaling[_ADAPTER]
        config = self._config.to_dict()
        config |= {"lora_alpha": scale * config["r"], "use_rslora": False}
        path = folder / export_files.LORA_FILE
        export_files.write_lora(path, tensors, self.prefix, config, metadata)
        if self.layout == "diffusers":
            return [path]
        other = path.with_name(f"{path.stem}.{self.layout}.safetensors")
        write_changes(other, read_changes(path, self.family), self.layout, self.family, metadata)
        return [path, other]

    def start_from(self, path: Path, family: type[Family]) -> None:
        """Copy a LoRA in any layout into these adapters.

        Raises:
            ConfigError: There is no such file, or its modules, rank, alpha or kind are not these.
            ModelError: It cannot be read, or is not a LoRA of this denoiser.
        """
        changes, ours = read_changes(path, family), self.layers()
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
        state = export_files.read_tensors(file)
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
            self.denoiser.set_adapter(_ADAPTER)

    def _compare(self, state: Mapping[str, Tensor], file: Path) -> Verified:
        ours, theirs = self.layers(), self.layers(_CHECK)
        keys = {f"{self.prefix}.{name}" for name in self.parameters()}
        wrong = sorted(set(ours) ^ set(theirs)) + sorted(set(state) ^ keys)
        largest = 0.0
        for name in ours.keys() & theirs.keys():
            error = self._difference(name, ours[name], theirs[name], state)
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

    def _difference(self, name: str, mine: Any, other: Any, state: Mapping[str, Tensor]) -> float:
        """The largest difference of the two changes, relative to the largest entry of mine."""
        a, b = (state[f"{self.prefix}.{name}.lora_{x}.weight"] for x in "AB")
        pairs = [(other.lora_A, a, mine.lora_A), (other.lora_B, b, mine.lora_B)]
        if _ADAPTER in mine.lora_magnitude_vector:
            magnitude = state[f"{self.prefix}.{name}.lora_magnitude_vector"]
            pairs.append((other.lora_magnitude_vector, magnitude, mine.lora_magnitude_vector))
        for loaded, filed, trained in pairs:
            weight = loaded[_CHECK].weight if _CHECK in loaded else filed.new_empty(0)
            held = trained[_ADAPTER].weight.detach().float().cpu()
            if not torch.equal(weight.cpu(), filed.to(weight.dtype)) or not torch.equal(
                held, filed
            ):
                return float("inf")
        mine_a, mine_b = (
            x[_ADAPTER].weight.detach().float().cpu() for x in (mine.lora_A, mine.lora_B)
        )
        trained = mine_b.flatten(1) @ mine_a.flatten(1) * mine.scaling[_ADAPTER]
        reloaded = b.float().flatten(1) @ a.float().flatten(1) * other.scaling[_CHECK]
        scale = max(trained.abs().max().item(), 1e-12)
        return float((trained - reloaded).abs().max().item()) / scale
