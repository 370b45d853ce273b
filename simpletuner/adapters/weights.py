"""The weights of a run in the state a reader needs them in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from simpletuner.adapters.method import Trainable


@dataclass(frozen=True)
class Weights:
    """What trains and the optimizer that moves it; used by validator, saver and the last export."""

    trainable: Trainable
    optimizer: torch.optim.Optimizer

    @contextmanager
    def at(self, state: str) -> Iterator[None]:
        """Hold the weights at `state` while the context is open; everything is as before after it.

        Args:
            state: ``raw``: as they train. ``eval``: as they are shown and saved, dropout off.
        """
        modules = dict(self.trainable.denoiser.named_modules())
        modes = {name: module.training for name, module in modules.items()}
        if state == "eval":
            self.trainable.denoiser.eval()
        try:
            yield
        finally:
            for name, module in modules.items():
                module.training = modes[name]
