"""LoRA by peft: fp32 adapters beside a frozen base (Hu et al. 2021, arXiv 2106.09685).

The change of a module's weight is ``(alpha / rank) * B @ A``, A [rank, in], B [out, rank]; with
rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) the factor is ``alpha / sqrt(rank)``. DoRA (Liu et al.
2024, arXiv 2402.09353) gives the changed weight's rows the lengths of a trained vector [out]. With
LoRA+ (Hayou et al. 2024, arXiv 2402.12354) B learns faster than A.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simpletuner.adapters import export as export_files
from simpletuner.adapters.adapted import TRAINED, Adapted, AdaptedEncoder
from simpletuner.adapters.formats import read_changes, write_changes
from simpletuner.adapters.method import Verified
from simpletuner.adapters.named import named_weights, targets_apart
from simpletuner.adapters.whole import Whole
from simpletuner.core.errors import ConfigError, TrainingError
from simpletuner.core.tensors import read_tensors
from simpletuner.core.types import ParamGroup

if TYPE_CHECKING:
    from simpletuner.adapters.settings import AdapterSettings
    from simpletuner.core.types import Batch, Draw
    from simpletuner.models.encoders import TextEncoders
    from simpletuner.models.family import Family


def attach(
    denoiser: nn.Module,
    family: Family,
    settings: AdapterSettings,
    encoders: TextEncoders | None = None,
) -> LoRA:
    """Freeze `denoiser` but for what trains whole, and give its target modules an adapter each.

    Args:
        denoiser: What predicts.
        family: Whose it is.
        settings: Of the adapters.
        encoders: Text encoders that get some too; None where captions are encoded beforehand.

    Raises:
        ConfigError: A name that nothing matches, or an `init_lora` that does not fit.
    """
    weights = named_weights(denoiser, family, settings)
    targets = targets_apart(denoiser, family, settings, weights)
    denoiser.requires_grad_(False)
    own = Adapted(denoiser, family.denoiser)
    own.attach(targets, settings)
    parts: list[Adapted] = [own]
    for name, encoder in encoders.trained.items() if encoders else ():
        parts.append(AdaptedEncoder(encoder, name))
        parts[-1].attach(family.trained_text[name].targets(encoder), settings)
    whole = Whole.of(denoiser, family.denoiser, weights)
    layout, ratio = settings.lora_format, settings.loraplus_lr_ratio
    lora = LoRA(denoiser, tuple(parts), family, whole, layout, encoders, ratio)
    if settings.init_lora:
        lora.start_from(export_files.lora_file(settings.init_lora), type(family))
    return lora


@dataclass(frozen=True)
class LoRA:
    """A denoiser with LoRA adapters, text encoders with them, and weights that train whole.

    Implements Trainable.
    """

    denoiser: nn.Module
    parts: tuple[Adapted, ...]
    family: Family
    whole: Whole
    layout: str = "diffusers"
    encoders: TextEncoders | None = None
    loraplus_lr_ratio: float | None = None

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """See Trainable."""
        return tuple(part.module for part in self.parts)

    @property
    def file(self) -> str:
        """See Trainable."""
        return export_files.LORA_FILE

    @property
    def summary(self) -> str:
        """See Trainable."""
        facts, kind = self.facts, "DoRA" if self._config.use_dora else "lora"
        names = [part.part for part in self.parts]
        of = f" of {', '.join(names)}" if self.encoders else ""
        ratio = self.loraplus_lr_ratio
        whole = len(self.whole.parameters)
        beside = f", and {whole} weights of the {self.whole.part} whole" if whole else ""
        faster = f", B at {ratio:g} times the rate" if ratio is not None else ""
        return f"{kind}{of}, rank {facts['lora_rank']}, alpha {facts['lora_alpha']}{faster}{beside}"

    @property
    def facts(self) -> Mapping[str, str]:
        """See Trainable."""
        return {"lora_rank": str(self._config.r), "lora_alpha": f"{self._config.lora_alpha:g}"}

    @property
    def _config(self) -> Any:
        return self.parts[0].config

    def usage(self, base: str, root: Path) -> list[str]:
        """See Trainable."""
        return [
            "from diffusers import DiffusionPipeline",
            f'pipe = DiffusionPipeline.from_pretrained("{base}")',
            *self.whole.usage(root),
            f'pipe.load_lora_weights("{root}", weight_name="{self.file}")',
        ]

    def layers(self) -> dict[str, Any]:
        """The modules that carry an adapter, by name."""
        return {name: layer for part in self.parts for name, layer in part.layers().items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """What every module's adapter is made of, and what trains whole, by names in the files."""
        adapters = {name: p for part in self.parts for name, p in part.parameters().items()}
        return {**adapters, **self.whole.parameters}

    def groups(self) -> list[ParamGroup]:
        """The adapters of the denoiser and of text encoders, with LoRA+ their B apart; the rest."""
        denoiser, *encoders = self.parts
        of_text = {name: p for part in encoders for name, p in part.parameters().items()}
        groups = [ParamGroup("lora", denoiser.parameters())]
        groups += [ParamGroup("text encoders", of_text, text=True)] * bool(of_text)
        return [part for group in groups for part in self._by_rate(group)] + self.whole.groups()

    def _by_rate(self, group: ParamGroup) -> list[ParamGroup]:
        if self.loraplus_lr_ratio is None:
            return [group]
        outputs = {n: p for n, p in group.parameters.items() if n.endswith(_PARTS[1])}
        others = {n: p for n, p in group.parameters.items() if n not in outputs}
        faster = replace(group, name=f"{group.name}, B", lr_scale=self.loraplus_lr_ratio)
        return [replace(group, parameters=others), replace(faster, parameters=outputs)]

    def predict(self, family: Family, draw: Draw, batch: Batch) -> Tensor:
        """See Trainable; encodes the captions where text encoders train."""
        if self.encoders is not None:
            captions = [sample.caption for sample in batch.samples]
            batch = replace(batch, embeds=self.encoders.embeds(captions))
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
        for part in self.parts:
            part.enable(on=False)
        try:
            with self.whole.untrained():
                yield
        finally:
            for part in self.parts:
                part.enable(on=True)

    def export(self, folder: Path, metadata: Mapping[str, str]) -> list[Path]:
        """Write ``pytorch_lora_weights.safetensors`` in the diffusers layout, then in another's.

        What trains whole is a file beside it; ComfyUI's layout holds both.
        """
        tensors = {key: tensor for part in self.parts for key, tensor in part.tensors().items()}
        path = folder / export_files.LORA_FILE
        configs = {part.part: part.told() for part in self.parts}
        export_files.write_lora(path, tensors, configs, {**metadata, **self.whole.facts})
        beside = self.whole.export(folder, metadata)
        if self.layout == "diffusers":
            return [path, *beside]
        other = path.with_name(f"{path.stem}.{self.layout}.safetensors")
        family, names = type(self.family), self.family.names_of(self.denoiser)
        changes = read_changes(path, family, names)
        more = self.whole.changes(names) if beside else {}
        write_changes(other, changes, self.layout, family, metadata, names, more)
        return [path, *beside, other]

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
            scale, mine = change.alpha / change.rank, ours[name].scaling[TRAINED]
            if change.rank != ours[name].r[TRAINED]:
                what = f"{name} has another rank, {change.rank}"
            elif abs(scale - mine) > 1e-6:
                what = f"its alpha / rank is {scale:g}, yours is {mine:g}"
            elif (change.magnitude is None) == (TRAINED in ours[name].lora_magnitude_vector):
                what = "one of the two is a DoRA, the other a plain LoRA"
        if what is not None:
            raise ConfigError(
                f"init_lora: {path.name} does not fit: {what}",
                fix="set lora_rank, lora_alpha, use_dora, peft_lora_target_modules and"
                " train_text_encoder to the file's",
            )
        trained = self.parameters()
        with torch.no_grad():
            for name, change in changes.items():
                trained[f"{name}.lora_A.weight"].copy_(change.down)
                trained[f"{name}.lora_B.weight"].copy_(change.up)
                if change.magnitude is not None:
                    trained[f"{name}.lora_magnitude_vector"].copy_(change.magnitude)
        self.whole.start_from(path)

    def verify(self, file: Path) -> Verified:
        """Load `file` with the stock loader as a second adapter and compare module by module.

        The stock loader casts to the base's dtype, so the change is computed in fp32 from the
        file's tensors with the modules and the scale the loader gave them; what it loaded must be
        those tensors in its dtype.

        Raises:
            TrainingError: A module is missing, extra, or changed by more than 1e-6.
        """
        import diffusers

        state, told = read_tensors(file), export_files.adapter_metadata(file)
        pipeline = getattr(diffusers, self.family.pipeline)
        wrong = sorted(state.keys() ^ {part.key(n) for part in self.parts for n in part.change()})
        largest = 0.0
        for part in self.parts:
            with part.read_back(state, told, pipeline) as theirs:
                ours, change = part.layers(), part.change()
                wrong += sorted(set(ours) ^ set(theirs))
                for name in ours.keys() & theirs.keys():
                    held = {n: change[f"{name}.{n}"] for n in _PARTS if f"{name}.{n}" in change}
                    keys = {n: part.key(f"{name}.{n}") for n in _PARTS}
                    filed = {n: state[key] for n, key in keys.items() if key in state}
                    scale = ours[name].scaling[TRAINED]
                    error = theirs[name].difference(held, filed, scale)
                    largest = max(largest, error)
                    if not error <= 1e-6:
                        wrong.append(name)
        self.whole.learn()
        wrong += self.whole.differing(file.parent, self.family)
        if wrong:
            raise TrainingError(
                f"{file.name} was written, but the stock loader reads back another model:"
                f" {len(wrong)} modules differ, for example {wrong[0]}",
                fix="keep the last checkpoint and report this: the file must not be used",
            )
        count = len(self.layers()) + len({n.rpartition(".")[0] for n in self.whole.parameters})
        return Verified(count, count, largest)


_PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
