"""Where on the noise schedule each sample of a window is trained.

Letters: N samples in the window, B in the batch; sigma is the share of noise in 0 … 1. A law is a
composition of pure functions of the quantile, so that what is drawn stays stratified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from simpletuner.diffusion.distributions import (
    auto_shift,
    beta_quantile,
    cubic_quantile,
    list_quantile,
    logit_normal,
    shifted,
)

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.core.seeds import Seeds
    from simpletuner.diffusion.settings import DiffusionSettings

    Law = Callable[[Tensor, int, float], Tensor]
    """Quantiles [B] in [0, 1), tokens and offset of the batch to sigma [B], fp64."""


def quantiles(seeds: Seeds, step: int, total: int) -> Tensor:
    """Stratified uniform draws: one in each of N equal slices of [0, 1), in random order.

    Every single draw is uniform on its own, whatever its place in the window, and the window as a
    whole covers the schedule evenly, which lowers the variance of the loss.

    Args:
        seeds: Of the run.
        step: The optimizer step.
        total: N, over all micro-batches and ranks.

    Returns:
        [N] fp64 on the CPU.
    """
    generator = seeds.generator("timestep", step)
    order = torch.randperm(total, generator=generator)
    inside = torch.rand(total, generator=generator, dtype=torch.float64)
    return (order + inside) / total


@dataclass(frozen=True)
class Quantiles:
    """Which quantiles of its law a window is trained at.

    Args:
        settings: Whether they are stratified, independent, or go through a list in turn.
        seeds: Of the run.
    """

    settings: DiffusionSettings
    seeds: Seeds

    def __call__(self, step: int, total: int) -> Tensor:
        """[N] fp64 on the CPU, for the N samples of optimizer step `step`."""
        settings = self.settings
        if settings.flow_timesteps_mode == "round-robin" and settings.flow_custom_timesteps:
            return in_turn(step, total, len(settings.flow_custom_timesteps))
        if settings.disable_segmented_timestep_sampling:
            generator = self.seeds.generator("timestep", step)
            return torch.rand(total, generator=generator, dtype=torch.float64)
        return quantiles(self.seeds, step, total)


def in_turn(step: int, total: int, count: int) -> Tensor:
    """The quantiles [N] of N draws that go on through `count` equal shares, one after another."""
    places = (step * total + torch.arange(total)) % count
    return (places.double() + 0.5) / count


def flow_law(settings: DiffusionSettings, scheduler_config: Mapping[str, Any]) -> Law:
    """How flow models draw their noise levels.

    Args:
        settings: The spread over sigma, and the shift.
        scheduler_config: The checkpoint's own, for its shift by size.
    """
    if settings.flow_levels:
        listed = list_quantile(settings.flow_levels)
        return lambda u, tokens, offset: listed(u)
    fixed = settings.flow_schedule_shift or 1.0
    by_size = partial(auto_shift, scheduler_config=scheduler_config)
    spread = _spread(settings)

    def law(u: Tensor, tokens: int, offset: float) -> Tensor:
        sigma = spread(u.double(), offset)
        return shifted(sigma, by_size(tokens) if settings.flow_schedule_auto_shift else fixed)

    return law


def _spread(settings: DiffusionSettings) -> Callable[[Tensor, float], Tensor]:
    """Quantiles and the offset to sigma before the shift; only the logit-normal has an offset."""
    if settings.flow_cubic_schedule_weights:
        cubic = cubic_quantile(settings.flow_cubic_schedule_weights)
        return lambda u, offset: cubic(u)
    if settings.flow_use_beta_schedule:
        beta = beta_quantile(settings.flow_beta_schedule_alpha, settings.flow_beta_schedule_beta)
        return lambda u, offset: beta(u)
    if settings.flow_use_uniform_schedule:
        return lambda u, offset: u
    return lambda u, offset: logit_normal(u, settings.flow_sigmoid_scale, offset)


def chances(settings: DiffusionSettings, count: int) -> Tensor | None:
    """[count] fp64 how often each discrete timestep is drawn; None for all alike.

    Args:
        settings: The part of the schedule that timestep_bias_strategy favours, and how much; the
            part that refiner_training leaves out.
        count: Steps of the training schedule.
    """
    strategy, part = settings.timestep_bias_strategy, int(settings.timestep_bias_portion * count)
    places = {
        "earlier": slice(0, part),
        "later": slice(count - part, count),
        "range": slice(settings.timestep_bias_begin, settings.timestep_bias_end),
    }
    if strategy not in places and not settings.refiner_training:
        return None
    found = torch.ones(count, dtype=torch.float64)
    if strategy in places:
        found[places[strategy]] = settings.timestep_bias_multiplier
    if settings.refiner_training:
        split = round(settings.refiner_training_strength * count)
        inverted = settings.refiner_training_invert_schedule
        found[slice(0, split) if inverted else slice(split, count)] = 0
    return found
