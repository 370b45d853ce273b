"""LyCORIS adapters (Yeh et al. 2023, arXiv 2309.14859) by its own library.

The library's ``merge_to`` squares the scale of loha and lokr (lycoris-lora 4.1.3), so files are
checked, and users are told to load them, with ``apply_to``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simpletuner.adapters import export as export_files
from simpletuner.adapters.lycoris_names import LIBRARY, to_layout, to_library
from simpletuner.adapters.lycoris_settings import LycorisConfig
from simpletuner.adapters.method import Verified
from simpletuner.core.errors import ConfigError, ModelError, TrainingError, did_you_mean
from simpletuner.core.extras import require
from simpletuner.core.files import write_json
from simpletuner.core.tensors import read_tensors, write_tensors
from simpletuner.core.types import ParamGroup

if TYPE_CHECKING:
    from simpletuner.adapters.settings import AdapterSettings
    from simpletuner.core.types import Batch, Draw
    from simpletuner.models.family import Family
    from simpletuner.models.original import OriginalNames

CONFIG_FILE = "lycoris_config.json"
_HEADER = "lycoris_config"
_CHILD = "lycoris"
_PRESETS = (
    *("ENABLE_CONV", "TARGET_REPLACE_MODULE", "TARGET_REPLACE_NAME", "MODULE_ALGO_MAP"),
    *("NAME_ALGO_MAP", "LORA_PREFIX", "USE_FNMATCH", "TARGET_EXCLUDE_NAME"),
)
"""What the library keeps of a preset, for the whole process."""


def attach(denoiser: nn.Module, family: Family, settings: AdapterSettings) -> Lycoris:
    """Freeze `denoiser` and give its target modules an adapter each.

    Raises:
        ConfigError: A target that nothing matches, or an `init_lora` that does not fit.
        ExtraMissing: The library is not installed.
    """
    require("lycoris", extra="lycoris", why="lora_type lycoris")
    from lycoris import LycorisNetwork, create_lycoris

    assert isinstance(settings.lycoris_config, Mapping), "a file is read with the settings"
    config = LycorisConfig.model_validate(settings.lycoris_config)
    preset = config.apply_preset.model_dump(exclude_none=True)
    if not preset.keys() & {"target_module", "target_name", "module_algo_map", "name_algo_map"}:
        preset["target_module"] = _classes_around(denoiser, family.lora_targets)
    _check_classes(denoiser, preset)
    denoiser.requires_grad_(False)
    options = config.model_dump(exclude_none=True, exclude={"apply_preset"})
    with _library_as_it_was():
        LycorisNetwork.apply_preset({"target_module": [], **_lists(preset)})
        whole = "full" if config.apply_preset.enable_conv else "full-lin"
        network = create_lycoris(denoiser, preset=whole, **options)
    if not network.loras:
        raise ConfigError(
            "lycoris_config: no module of the model is named by apply_preset",
            fix=f"leave apply_preset out, or name classes such as {', '.join(_classes(denoiser))}",
        )
    network.apply_to()
    network.to(next(denoiser.parameters()).device).requires_grad_(True)
    for parameter in network.parameters():
        parameter.data = parameter.data.float()
    denoiser.add_module(_CHILD, network)  # so that it leaves training mode with the denoiser
    found = Lycoris(denoiser, family.denoiser, config, type(family), settings.lora_format)
    if settings.init_lora:
        found.start_from(export_files.lora_file(settings.init_lora))
    return found


@dataclass(frozen=True)
class Lycoris:
    """A denoiser with LyCORIS adapters; implements Trainable."""

    denoiser: nn.Module
    part: str
    config: LycorisConfig
    family: type[Family]
    layout: str = "diffusers"

    @property
    def network(self) -> Any:
        """The library's own holder of the adapters."""
        return getattr(self.denoiser, _CHILD)

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
        sizes = f"dim {self.config.linear_dim}, alpha {self.config.linear_alpha:g}"
        return f"LyCORIS {self.config.algo}, {sizes}, {len(self.network.loras)} modules"

    @property
    def facts(self) -> Mapping[str, str]:
        """See Trainable."""
        told = self.config.model_dump(mode="json", exclude_unset=True)
        return {_HEADER: json.dumps(told, sort_keys=True)}

    def usage(self, base: str, root: Path) -> list[str]:
        """See Trainable."""
        return [
            "from diffusers import DiffusionPipeline",
            "from lycoris import create_lycoris_from_weights",
            f'pipe = DiffusionPipeline.from_pretrained("{base}")',
            f'adapter, _ = create_lycoris_from_weights(1.0, "{root / self.file}",'
            f" pipe.{self.part})",
            "adapter.apply_to()  # not merge_to, which squares the scale of some kinds",
        ]

    def parameters(self) -> dict[str, nn.Parameter]:
        """What every module's adapter is made of, by its name in the library."""
        return dict(self.network.named_parameters())

    def groups(self) -> list[ParamGroup]:
        """One group: every adapter decays and learns alike."""
        return [ParamGroup("lycoris", self.parameters())]

    def predict(self, family: Family, draw: Draw, batch: Batch) -> Tensor:
        """See Trainable."""
        return family.predict(self.denoiser, draw, batch)

    def open_sampler(self, family: Family, vae: nn.Module) -> Any:
        """See Trainable."""
        return family.open_sampler(self.denoiser, vae)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """See Trainable."""
        held = [lora for lora in self.network.loras if lora.org_module[0].forward == lora.forward]
        for lora in held:
            _take_off(lora)
        try:
            yield
        finally:
            for lora in held:
                _put_on(lora)

    def export(self, folder: Path, metadata: Mapping[str, str]) -> list[Path]:
        """Write ``pytorch_lora_weights.safetensors`` with the library's names, and its config."""
        path = folder / self.file
        write_tensors(path, self._tensors(), {"format": "pt", **metadata})
        config = folder / CONFIG_FILE
        write_json(config, self.config.model_dump(mode="json", exclude_unset=True))
        if self.layout == "diffusers":
            return [path, config]
        other = path.with_name(f"{path.stem}.{self.layout}.safetensors")
        named = to_layout(self._tensors(), self.layout, self.family, self._names)
        write_tensors(other, named, {"format": "pt", **metadata})
        return [path, config, other]

    @property
    def _names(self) -> OriginalNames:
        return self.family.names_of(self.denoiser)

    def _tensors(self) -> dict[str, Tensor]:
        state = self.network.state_dict()
        return {name: t.detach().float().cpu().contiguous() for name, t in state.items()}

    def start_from(self, path: Path) -> None:
        """Copy a LyCORIS file in any layout into these adapters.

        Raises:
            ConfigError: There is no such file, or it is of other modules, sizes or another kind.
            ModelError: It cannot be read, or is no LyCORIS of this denoiser.
        """
        from safetensors import SafetensorError

        try:
            given = read_tensors(path)
        except FileNotFoundError:
            raise ConfigError(f"init_lora: {path} does not exist") from None
        except (SafetensorError, OSError) as error:
            raise ModelError(f"init_lora: {path.name} cannot be read: {error}") from error
        ours = self._tensors()
        if any(not name.startswith(LIBRARY) for name in given):
            given = to_library(given, self.family, self._names)
        wrong = sorted(ours.keys() ^ given.keys())
        wrong += [n for n in ours.keys() & given.keys() if ours[n].shape != given[n].shape]
        wrong += [
            name
            for name in ours.keys() & given.keys()
            if name.endswith(".alpha") and not torch.equal(ours[name], given[name].float())
        ]
        if wrong:
            raise ConfigError(
                f"init_lora: {path.name} does not fit: {len(wrong)} tensors differ, for example"
                f" {wrong[0]}",
                fix=f"set lycoris_config to what the file was made with ({CONFIG_FILE} beside it)",
            )
        with torch.no_grad():
            for lora in self.network.loras:
                _fill(lora, {n: given[f"{lora.lora_name}.{n}"] for n in lora.state_dict()})

    def verify(self, file: Path) -> Verified:
        """Load `file` with the library's own loader and compare module by module.

        Raises:
            TrainingError: A module is missing, extra, or answers otherwise.
        """
        from lycoris import create_lycoris_from_weights

        given = read_tensors(file)
        ours = {lora.lora_name: lora for lora in self.network.loras}
        # ``full`` holds weights, which its file gives as differences: the tensors say it all
        told = {name: lora for name, lora in ours.items() if not hasattr(lora, "is_diff")}
        answers = {name: _answer(lora.org_module[0]) for name, lora in told.items()}
        largest = 0.0
        with self.disabled(), torch.no_grad(), _library_as_it_was():
            stock, _ = create_lycoris_from_weights(1.0, "", self.denoiser, weights_sd=dict(given))
            device, training = next(self.denoiser.parameters()).device, self.network.training
            # Until it is applied, the library's network does not hold what it has loaded.
            theirs = {lora.lora_name: lora.to(device).train(training) for lora in stock.loras}
            wrong = sorted(ours.keys() ^ theirs.keys())
            for name in sorted(told.keys() & theirs.keys()):
                module = ours[name].org_module[0]
                base, loaded = _answer(module), _answer(module, theirs[name].forward)
                change = float((answers[name] - base).abs().max())
                error = float((answers[name] - loaded).abs().max())
                rounding = 1e-5 * float(base.abs().max())
                largest = max(largest, error / max(change, rounding, 1e-12))
                if not error <= 1e-4 * change + rounding:
                    wrong.append(name)
        held = self._tensors()
        wrong += sorted(held.keys() ^ given.keys())
        wrong += [n for n in held.keys() & given.keys() if not torch.equal(held[n], given[n])]
        if wrong:
            raise TrainingError(
                f"{file.name} was written, but its loader reads back another model:"
                f" {len(wrong)} modules differ, for example {wrong[0]}",
                fix="keep the last checkpoint and report this: the file must not be used",
            )
        return Verified(len(ours), len(ours), largest)


# --- the library ----------------------------------------------------------------------------------


@contextmanager
def _library_as_it_was() -> Iterator[None]:
    """Keep a preset from outliving its use, and the library from talking."""
    from lycoris import LycorisNetwork
    from lycoris.logging import logger

    kept, level = {name: getattr(LycorisNetwork, name) for name in _PRESETS}, logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in kept.items():
            setattr(LycorisNetwork, name, value)


def _take_off(lora: Any) -> None:
    """Let a module answer as if it had no adapter."""
    module = lora.org_module[0]
    if hasattr(lora, "is_diff"):  # ``full`` took the module's weights away
        device = lora.weight.device
        lora.restore()
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(device)
    else:
        module.forward = lora.org_forward


def _put_on(lora: Any) -> None:
    module = lora.org_module[0]
    module.forward = lora.forward
    if hasattr(lora, "is_diff"):
        del module.weight
        if lora.org_bias is not None:
            del module.bias


def _fill(lora: Any, values: Mapping[str, Tensor]) -> None:
    """Copy what a file holds of one module; ``full`` writes differences and holds weights."""
    named = dict(lora.named_parameters())
    for name, value in values.items():
        if name == "diff":
            lora.weight.copy_(value.to(lora.weight) + lora.org_weight.to(lora.weight))
        elif name == "diff_b":
            lora.bias.copy_(value.to(lora.bias) + lora.org_bias[0].to(lora.bias))
        elif name in named:
            named[name].copy_(value)


@torch.no_grad()
def _answer(module: Any, forward: Any = None) -> Tensor:
    """What a module, or `forward` in its place, says to numbers that are always the same.

    Returns:
        fp32, on the CPU.
    """
    if hasattr(module, "in_features"):
        shape: tuple[int, ...] = (4, module.in_features)
    elif hasattr(module, "in_channels"):
        shape = (1, module.in_channels, 8, 8)
    elif hasattr(module, "num_channels"):
        shape = (1, module.num_channels, 4, 4)
    else:
        shape = (4, *module.normalized_shape)
    weight = next(module.parameters(recurse=False))
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    probe = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    answer: Tensor = (forward or module)(probe.to(weight.device, dtype))
    return answer.float().cpu()


# --- targets --------------------------------------------------------------------------------------


def _lists(preset: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in preset.items()
    }


def _classes(denoiser: nn.Module) -> list[str]:
    """The classes of the denoiser's own that hold weights, the outermost and torch's left out."""
    found = {
        type(m).__name__ for m in denoiser.modules() if not _is_torchs(m) and m is not denoiser
    }
    return sorted(found)


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _classes_around(denoiser: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """The classes of the modules that hold the usual LoRA targets: attention, by other names."""
    firsts = {target.partition(".")[0] for target in targets}
    return sorted(
        {
            type(module).__name__
            for module in denoiser.modules()
            if firsts & {name for name, _ in module.named_children()}
        }
    )


def _check_classes(denoiser: nn.Module, preset: Mapping[str, Any]) -> None:
    known = {type(module).__name__ for module in denoiser.modules()}
    named = [*preset.get("target_module", ()), *preset.get("module_algo_map", ())]
    for name in named:
        if name not in known:
            near = did_you_mean(name, known)
            raise ConfigError(
                f"lycoris_config: no module of the model is a {name}{near}",
                fix=f"name classes of it: {', '.join(_classes(denoiser))}",
            )
