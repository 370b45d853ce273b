"""Regression losses of a prediction and its target; per sample, so that the plan can weigh them.

Letters: B batch, C channels; *S = H,W or F,H,W.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simpletuner.core.table import Row, Table
from simpletuner.core.types import wide

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.core.types import Draw
    from simpletuner.diffusion.objective import Objective
    from simpletuner.diffusion.settings import DiffusionSettings


def l2(off: Tensor, c: Tensor) -> Tensor:
    """``off ** 2``; `c` does not matter."""
    return off.square()


def l1(off: Tensor, c: Tensor) -> Tensor:
    """``|off|``; `c` does not matter."""
    return off.abs()


def huber(off: Tensor, c: Tensor) -> Tensor:
    """Pseudo-Huber, ``2 c (sqrt(off^2 + c^2) - c)``: ``off^2`` near 0, ``2 c |off|`` far."""
    return 2 * c * _rounded(off, c)


def smooth_l1(off: Tensor, c: Tensor) -> Tensor:
    """``2 (sqrt(off^2 + c^2) - c)``: ``off^2 / c`` near 0, ``2 |off|`` far from it."""
    return 2 * _rounded(off, c)


def _rounded(off: Tensor, c: Tensor) -> Tensor:
    """``sqrt(off^2 + c^2) - c``, without the difference of two numbers that are nearly the same."""
    square = off.square()
    return square / ((square + c * c).sqrt() + c)


LOSSES = Table(
    "loss_type",
    (
        Row("l2", l2, "Mean squared error."),
        Row("l1", l1, "Mean absolute error."),
        Row("huber", huber, "Squared for small errors, linear for large ones.", facts={"c": True}),
        Row("smooth_l1", smooth_l1, "Absolute error, rounded off near zero.", facts={"c": True}),
    ),
)


def constant(c: float, draw: Draw, objective: Objective) -> Tensor:
    """`c` at every noise level, [B]."""
    return draw.sigma * 0 + c


def exponential(c: float, draw: Draw, objective: Objective) -> Tensor:
    """``c ** (t / 1000)``: 1 without noise, `c` in pure noise, [B]."""
    return (draw.timestep / 1000 * math.log(c)).exp()


def snr(c: float, draw: Draw, objective: Objective) -> Tensor:
    """``(1 - c) / (1 + s)^2 + c``, s being noise over signal: about 1 without noise, `c` in noise.

    The outliers of pictures with little noise are details; those with much noise are guesses, which
    is where a small `c` heeds them less. Flow models take the same sense, [B].
    """
    signal, spread = objective.shares(draw)
    return (1 - c) * (signal / (signal + spread)).square() + c


HUBER_SCHEDULES = Table(
    "huber_schedule",
    (
        Row("snr", snr, "Falls with the share of the signal."),
        Row("exponential", exponential, "Falls exponentially with the timestep."),
        Row("constant", constant, "The same everywhere."),
    ),
)


@dataclass(frozen=True)
class Loss:
    """The error of each element of a prediction, and what a sample weighs by its noise."""

    make: Callable[[Tensor, Tensor], Tensor]
    c: Callable[[float, Draw, Objective], Tensor]
    huber_c: float
    gamma: float | None
    soft: bool
    flow: bool
    objective: Objective

    @classmethod
    def of(cls, settings: DiffusionSettings, objective: Objective) -> Loss:
        """The loss that the settings want of a model with `objective`."""
        soft = settings.use_soft_min_snr
        return cls(
            LOSSES[settings.loss_type].load(),
            HUBER_SCHEDULES[settings.huber_schedule].load(),
            settings.huber_c,
            settings.soft_min_snr_sigma_data**-2 if soft else settings.snr_gamma,
            soft,
            settings.diff2flow_enabled and settings.diff2flow_loss,
            objective,
        )

    def errors(self, prediction: Tensor, draw: Draw) -> Tensor:
        """[B, C, *S] fp32."""
        c = self.c(self.huber_c, draw, self.objective)
        off = prediction - draw.target
        if self.flow:
            off = off * wide(self.objective.flow_ratio(draw), off)
        return self.make(off, wide(c, off))

    def weights(self, draw: Draw) -> Tensor:
        """[B] the objective's own weights, times min-SNR (Hang et al. 2023, arXiv 2303.09556).

        Its soft form is that of Crowson et al. 2024 (arXiv 2401.11605), whose gamma is
        1 / sigma_data^2.
        """
        if self.gamma is None:
            return draw.weight
        return draw.weight * self.objective.min_snr(draw, self.gamma, self.soft)


def per_sample(errors: Tensor, mask: Tensor | None = None, *, normalise: bool = False) -> Tensor:
    """The mean error of each sample.

    The mean is over all elements, also those that a mask takes out: a sample weighs as much as the
    part of it that is learned; or, if `normalise`, over what the mask leaves in.

    Args:
        errors: [B, C, *S].
        mask: [B, 1, *S], a factor on the errors of each cell.
        normalise: Divide by the mean of the mask; a mask without anything gives 0.

    Returns:
        [B].
    """
    if mask is None:
        return errors.flatten(1).mean(1)
    means = (errors * mask).flatten(1).mean(1)
    return means / mask.flatten(1).mean(1).clamp_min(1e-6) if normalise else means
