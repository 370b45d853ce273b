"""How weights are trained: the methods and what each gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from simpletuner.core.table import Row, Table

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.adapters.settings import AdapterSettings
    from simpletuner.core.types import Batch, Draw, ParamGroup
    from simpletuner.models.encoders import TextEncoders
    from simpletuner.models.family import Family


@dataclass(frozen=True)
class Verified:
    """The result of reading an export back with the stock loader.

    Args:
        modules: Modules that carry the adapter.
        matched: Modules whose reloaded change equals the trainer's.
        largest_error: The largest difference of any entry, relative to the largest entry.
    """

    modules: int
    matched: int
    largest_error: float

    def __str__(self) -> str:
        return f"verified: {self.matched} of {self.modules} modules"


class Trainable(Protocol):
    """Weights that train, attached to a denoiser."""

    @property
    def denoiser(self) -> nn.Module:
        """The module that predicts, adapters included."""

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All that a step calls: the denoiser, and what trains beside it."""

    @property
    def file(self) -> str:
        """What an export is called: a file, or a folder."""

    @property
    def summary(self) -> str:
        """What trains, in a few words."""

    @property
    def facts(self) -> Mapping[str, str]:
        """What stands in the header of the user's files about the method."""

    def usage(self, base: str, root: Path) -> list[str]:
        """Lines of Python that load an export.

        Args:
            base: What the stock loader opens the base model by.
            root: The folder with the export.
        """

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What trains, by name, in a stable order."""

    def groups(self) -> Sequence[ParamGroup]:
        """What trains, for the optimizer."""

    def predict(self, family: Family, draw: Draw, batch: Batch) -> Tensor:
        """`family.predict` with the adapters on."""

    def open_sampler(self, family: Family, vae: nn.Module) -> Any:
        """The stock pipeline around the live modules."""

    def disabled(self) -> AbstractContextManager[Any]:
        """The untouched base, as long as the context is open; contexts may lie in each other."""

    def export(self, folder: Path, metadata: Mapping[str, str]) -> list[Path]:
        """Write what the user loads elsewhere into `folder`; the first is what `verify` reads."""

    def verify(self, file: Path) -> Verified:
        """Read an export back with the stock loader and compare it with what is in memory."""


METHODS = Table(
    "training method",
    (
        Row("lora", "simpletuner.adapters.lora:attach", "Low-rank adapters beside frozen weights."),
        Row(
            "lycoris",
            "simpletuner.adapters.lycoris:attach",
            "LyCORIS adapters: LoKr, LoHa and their kin.",
            needs="lycoris",
        ),
        Row("full", "simpletuner.adapters.full:attach", "All weights of the denoiser."),
        Row(
            "controlnet",
            "simpletuner.adapters.controlnet:attach",
            "A ControlNet beside the frozen denoiser.",
        ),
    ),
)


def method_of(settings: AdapterSettings) -> Row:
    """The row that the settings name together."""
    if settings.trains == "lora":
        return METHODS["lora" if settings.lora_type == "standard" else settings.lora_type]
    return METHODS[settings.trains]


def attach(
    denoiser: nn.Module,
    family: Family,
    settings: AdapterSettings,
    encoders: TextEncoders | None = None,
) -> Trainable:
    """Make a denoiser train as the settings say.

    Args:
        denoiser: What predicts.
        family: Whose it is.
        settings: Of the method.
        encoders: Text encoders that train beside it, which is for plain LoRA alone.

    Raises:
        ConfigError: The settings do not fit it.
    """
    make, beside = method_of(settings).load(), {"encoders": encoders} if encoders else {}
    trainable: Trainable = make(denoiser, family, settings, **beside)
    return trainable
