"""Regression losses of a prediction and its target; per sample, so that the plan can weigh them.

Letters: B batch, C channels; *S = H,W or F,H,W.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simpletuner.core.table import Row, Table

if TYPE_CHECKING:
    from torch import Tensor


def l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of each element.

    Args:
        prediction: [B, C, *S], fp32.
        target: [B, C, *S], fp32.

    Returns:
        [B, C, *S].
    """
    return (prediction - target).square()


def per_sample(errors: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean error of each sample.

    The mean is over all elements, also those that a mask takes out: a sample weighs as much as the
    part of it that is learned.

    Args:
        errors: [B, C, *S].
        mask: [B, 1, *S], a factor on the errors of each cell.

    Returns:
        [B].
    """
    return (errors if mask is None else errors * mask).flatten(1).mean(1)


LOSSES = Table(
    "loss_type",
    (
        Row("l2", l2, "Mean squared error."),
        Row("huber", None, "Squared for small errors, linear for large ones."),
        Row("smooth_l1", None, "Absolute error, rounded off near zero."),
    ),
)
