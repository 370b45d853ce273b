"""What the user names of a model: modules that get an adapter, and weights that train whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import float32, nn

from simpletuner.adapters.settings import ANY_DENOISER
from simpletuner.core.errors import ConfigError

if TYPE_CHECKING:
    from simpletuner.adapters.settings import AdapterSettings
    from simpletuner.models.family import Family

_KEY = "trainable_models"


def check(family: Family, settings: AdapterSettings) -> None:
    """Refuse names that this model has nothing for, before anything is encoded; reads no weights.

    Raises:
        ConfigError: A name fits nothing, or a module is named twice.
    """
    names = settings.trainable_models or settings.peft_lora_target_modules
    if settings.trains == "controlnet" or names is None:
        return
    denoiser = family.blueprint(float32)
    whole = named_weights(denoiser, family, settings)
    if settings.trains == "lora":
        targets_apart(denoiser, family, settings, whole)


# --- modules that get an adapter ------------------------------------------------------------------


def targets_apart(
    denoiser: nn.Module,
    family: Family,
    settings: AdapterSettings,
    whole: Mapping[str, nn.Parameter],
) -> list[str]:
    """The ends of names that get an adapter of plain LoRA, apart from the weights `whole`.

    Raises:
        ConfigError: One of them fits no module, or a module whose weights are among `whole`.
    """
    named = family.lora_target_sets.get(settings.flux_lora_target, family.lora_targets)
    targets = list(settings.peft_lora_target_modules or named)
    _check_targets(denoiser, targets)
    for weight in whole:
        module = weight.rpartition(".")[0]
        if any(_ends(module, target) for target in targets):
            raise ConfigError(
                f"{_KEY}: {module} would train whole and get an adapter as well",
                fix=f"name fewer modules there, or in peft_lora_target_modules those that get one"
                f" and are not in {_KEY}",
            )
    return targets


def _ends(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _check_targets(denoiser: nn.Module, targets: Sequence[str]) -> None:
    for target in targets:
        found = [module for name, module in denoiser.named_modules() if _ends(name, target)]
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


# --- weights that train whole ---------------------------------------------------------------------


def named_weights(
    denoiser: nn.Module, family: Family, settings: AdapterSettings
) -> dict[str, nn.Parameter]:
    """The weights that trainable_models names, by their names in `denoiser`; none without it.

    Raises:
        ConfigError: A name fits nothing, or only what the answer of the model does not depend on.
    """
    weights, unused = dict(denoiser.named_parameters()), family.unused(denoiser)
    found: set[str] = set()
    for name in settings.trainable_models or ():
        fitting = {weight for weight in weights if _fits(name, family.denoiser, weight)}
        if not fitting:
            near = _nearest(name, family, denoiser)
            raise ConfigError(
                f"{_KEY}: nothing of the {family.denoiser} is called {name!r}",
                fix=f"name modules by their path or the end of it{near}",
            )
        if fitting <= unused:
            raise ConfigError(
                f"{_KEY}: the answer of the {family.denoiser} does not depend on {name!r}",
                fix="remove it",
            )
        found |= fitting
    return {name: p for name, p in weights.items() if name in found - unused}


def _fits(name: str, denoiser: str, weight: str) -> bool:
    """True if `name` names a weight, or something that it is in."""
    model, _, path = name.partition(".")
    paths = (path or "*",) if model in (denoiser, ANY_DENOISER) else (name, f"*.{name}")
    return any(fnmatchcase(weight, end) for each in paths for end in (each, f"{each}.*"))


def _nearest(name: str, family: Family, denoiser: nn.Module) -> str:
    modules = [path for path, _ in denoiser.named_modules()]
    words = {*modules, *(path.rpartition(".")[2] for path in modules)}
    model, _, path = name.partition(".")
    asked = path if model in (family.denoiser, ANY_DENOISER) else name
    near = get_close_matches(asked, sorted(w for w in words if not w.isdigit()), cutoff=0.5)
    return f"; the nearest are {', '.join(near)}" if near else ""
