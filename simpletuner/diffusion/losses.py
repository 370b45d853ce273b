"""Regression losses of a prediction and its target; per sample, so that the plan can weigh them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simpletuner.core.table import Row, Table

if TYPE_CHECKING:
    from torch import Tensor


def l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample.

    Args:
        prediction: [B, C, *S], fp32.
        target: [B, C, *S], fp32.

    Returns:
        [B].
    """
    return (prediction - target).square().flatten(1).mean(1)


LOSSES = Table(
    "loss_type",
    (
        Row("l2", l2, "Mean squared error."),
        Row("huber", None, "Squared for small errors, linear for large ones."),
        Row("smooth_l1", None, "Absolute error, rounded off near zero."),
    ),
)
