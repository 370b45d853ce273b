"""Make a model fit its device: recomputed activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from simpletuner.precision.settings import PrecisionSettings


def fit(denoiser: nn.Module, settings: PrecisionSettings) -> None:
    """Apply the memory settings to a denoiser whose adapters are attached."""
    if settings.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
