"""The weights of a run in the state a reader needs them in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.adapters.ema import Ema
    from simpletuner.adapters.method import Trainable


class LossScaler(Protocol):
    """Keeps small gradients from vanishing; what `Stepper` and `Checkpointer` ask of it."""

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to go back from."""

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the gradients their own size again."""

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Let the optimizer step, unless a gradient is not finite; True if it did."""

    def tensors(self) -> dict[str, Tensor]:
        """What it remembers."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put that back."""


@dataclass(frozen=True)
class Weights:
    """What trains and the optimizer that moves it; used by validator, saver and the last export.

    Args:
        ema: The average of what trains; None without one.
        scaler: What scales the loss; None where it is left as it is.
    """

    trainable: Trainable
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    scaler: LossScaler | None = None

    def follow(self, step: int) -> None:
        """Let the average follow what optimizer step `step`, from 0, has done."""
        if self.ema is not None:
            self.ema.follow(step)

    @contextmanager
    def at(self, state: str) -> Iterator[None]:
        """Hold the weights at `state` while the context is open; everything is as before after it.

        Args:
            state: ``raw``: as they train. ``eval``: as they are shown and saved: their average, if
                there is one (ours, or that of an optimizer that keeps one), and dropout off.
        """
        modes = [(m, m.training) for each in self.trainable.modules for m in each.modules()]
        if state == "eval":
            for each in self.trainable.modules:
                each.eval()
        averaged: AbstractContextManager[object] = nullcontext()
        if state == "eval":
            averaged = self.ema.shown() if self.ema else self._averaged_by_the_optimizer()
        try:
            with averaged:
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    @contextmanager
    def _averaged_by_the_optimizer(self) -> Iterator[None]:
        """Hold the weights at what a schedule-free optimizer says they are worth.

        The way back is a copy: its own arithmetic would leave the weights a digit off.
        """
        if not hasattr(self.optimizer, "eval"):
            yield
            return
        held = list(self.trainable.parameters().values())
        kept = [parameter.detach().clone() for parameter in held]
        self.optimizer.eval()
        try:
            yield
        finally:
            self.optimizer.train()  # type: ignore[attr-defined]
            with torch.no_grad():
                for parameter, value in zip(held, kept, strict=True):
                    parameter.copy_(value)
