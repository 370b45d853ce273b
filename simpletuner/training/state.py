"""What a run knows of itself beside its tensors: a step number and a few facts."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from simpletuner import __version__

_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions that shape the numbers."""
    return {
        "simpletuner": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


@dataclass
class TrainState:
    """Where a run stands; ``state.json`` of a checkpoint.

    Args:
        data: What is trained on, by name, so that what changed can be named.
        model: What the trained tensors and the optimizer's memory belong to, by name.
        settings: What else shapes a step, by name.
        threads: torch's thread count: convolution gradients depend on it in the last bit.
        device: The kind of device, such as ``cpu``.
        step: Optimizer steps done.
        epoch: 0-based epoch of the last step.
        samples_seen: Samples trained on, repeats counted.
        skipped: Steps among those done that moved no weight, for their gradients overflowed.
        versions: Of what computes.
    """

    data: Mapping[str, str]
    model: Mapping[str, str]
    settings: Mapping[str, str]
    threads: int
    device: str
    step: int = 0
    epoch: int = 0
    samples_seen: int = 0
    skipped: int = 0
    versions: Mapping[str, str] = field(default_factory=versions)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)
