"""The weights of a run in the state a reader needs them in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from simpletuner.adapters.ema import Ema
    from simpletuner.adapters.method import Trainable


@dataclass(frozen=True)
class Weights:
    """What trains and the optimizer that moves it; used by validator, saver and the last export.

    Args:
        ema: The average of what trains; None without one.
    """

    trainable: Trainable
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None

    def follow(self, step: int) -> None:
        """Let the average follow what optimizer step `step`, from 0, has done."""
        if self.ema is not None:
            self.ema.follow(step)

    @contextmanager
    def at(self, state: str) -> Iterator[None]:
        """Hold the weights at `state` while the context is open; everything is as before after it.

        Args:
            state: ``raw``: as they train. ``eval``: as they are shown and saved: their average, if
                there is one, and dropout off.
        """
        modules = dict(self.trainable.denoiser.named_modules())
        modes = {name: module.training for name, module in modules.items()}
        if state == "eval":
            self.trainable.denoiser.eval()
        averaged = self.ema.shown() if self.ema and state == "eval" else nullcontext()
        try:
            with averaged:
                yield
        finally:
            for name, module in modules.items():
                module.training = modes[name]
