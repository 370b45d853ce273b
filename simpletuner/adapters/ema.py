"""A running average of the trained weights, in fp32 whatever they are in.

In bf16 an average of ordinary decay stands still: what a step adds to it is less than half of the
last digit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simpletuner.core.errors import TrainingError

if TYPE_CHECKING:
    from torch import nn

    from simpletuner.adapters.settings import AdapterSettings


class Ema:
    """The average of some parameters.

    Args:
        parameters: By name.
        decay: How slowly it follows.
        interval: Optimizer steps between two updates; the decay is that of so many steps.
        warmup: Optimizer steps in which it is a copy; 0 for a decay that grows with the steps.
        device: Where it is held.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        decay: float,
        interval: int = 1,
        warmup: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self._parameters = parameters
        self._decay, self._interval, self._warmup = decay, interval, warmup
        self.shadow: dict[str, Tensor] = {
            name: p.detach().to(device or p.device, torch.float32, copy=True)
            for name, p in parameters.items()
        }

    @classmethod
    def of(cls, parameters: Mapping[str, nn.Parameter], settings: AdapterSettings) -> Ema | None:
        """The average that the settings want; None for none."""
        if not settings.use_ema:
            return None
        return cls(
            parameters,
            decay=settings.ema_decay,
            interval=settings.ema_update_interval,
            warmup=settings.ema_warmup_steps,
            device=torch.device("cpu") if settings.ema_device == "cpu" else None,
        )

    def decay(self, step: int) -> float:
        """What is kept of it at optimizer step `step`, from 0.

        ``min((1 + step) / (10 + step), decay)``, or 0 in the warm-up and `decay` after it; to the
        power of the interval.
        """
        if self._warmup:
            return 0.0 if step < self._warmup else self._decay**self._interval
        return min((1 + step) / (10 + step), self._decay) ** self._interval

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move towards the weights as optimizer step `step`, from 0, has left them."""
        if (step + 1) % self._interval:
            return
        share = 1 - self.decay(step)
        for name, parameter in self._parameters.items():
            held = self.shadow[name]
            held.lerp_(parameter.detach().to(held.device, torch.float32), share)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The average in the place of the weights, which are as before afterwards."""
        kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        try:
            self._put(self.shadow)
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the average that a checkpoint holds.

        Raises:
            TrainingError: It is of other weights.
        """
        if tensors.keys() != self.shadow.keys():
            raise TrainingError(
                "the average in the checkpoint is of other weights",
                fix="set use_ema false, or start over with resume_from_checkpoint=none",
            )
        for name, held in self.shadow.items():
            held.copy_(tensors[name])
