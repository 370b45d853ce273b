"""Where on the noise schedule each sample of a window is trained.

Letters: N samples in the window, B in the batch; sigma is the share of noise in 0 … 1. A law is a
composition of pure functions of the quantile, so that what is drawn stays stratified.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.core.seeds import Seeds
    from simpletuner.diffusion.settings import DiffusionSettings

    Law = Callable[[Tensor, int], Tensor]
    """Quantiles [B] in [0, 1) and the tokens of each latent of the batch to sigma [B], fp64."""


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


def flow_law(settings: DiffusionSettings, scheduler_config: Mapping[str, Any]) -> Law:
    """How flow models draw their noise levels.

    Args:
        settings: The spread over sigma, and the shift.
        scheduler_config: The checkpoint's own, for its shift by size.
    """
    fixed = settings.flow_schedule_shift or 1.0
    by_size = partial(auto_shift, scheduler_config=scheduler_config)
    alpha, beta = settings.flow_beta_schedule_alpha, settings.flow_beta_schedule_beta
    by_beta = beta_quantile(alpha, beta) if settings.flow_use_beta_schedule else logit_normal

    def law(u: Tensor, tokens: int) -> Tensor:
        sigma = u.double()
        if settings.flow_use_beta_schedule:
            sigma = by_beta(sigma)
        elif not settings.flow_use_uniform_schedule:
            sigma = logit_normal(sigma, settings.flow_sigmoid_scale)
        return shifted(sigma, by_size(tokens) if settings.flow_schedule_auto_shift else fixed)

    return law


def biased(settings: DiffusionSettings, count: int) -> Tensor | None:
    """[count] fp64 how often each discrete timestep is drawn; None for all alike.

    Args:
        settings: The part of the schedule that timestep_bias_strategy favours, and how much.
        count: Steps of the training schedule.
    """
    strategy, part = settings.timestep_bias_strategy, int(settings.timestep_bias_portion * count)
    places = {
        "earlier": slice(0, part),
        "later": slice(count - part, count),
        "range": slice(settings.timestep_bias_begin, settings.timestep_bias_end),
    }
    if strategy not in places:
        return None
    chances = torch.ones(count, dtype=torch.float64)
    chances[places[strategy]] = settings.timestep_bias_multiplier
    return chances


_KNOTS = 8193


def beta_quantile(alpha: float, beta: float) -> Callable[[Tensor], Tensor]:
    """The inverse of the Beta distribution's cumulative function, fp64, off by less than 1e-6.

    With x = sin^2(a) the density over the angle is ``2 sin(a)^(2 alpha - 1) cos(a)^(2 beta - 1)``,
    which has no poles for parameters of 1/2 and more; it is summed by Simpson's rule.

    Args:
        alpha: At least 1/2.
        beta: The same.
    """
    fine = torch.linspace(0, math.pi / 2, 2 * _KNOTS - 1, dtype=torch.float64)
    density = fine.sin().pow(2 * alpha - 1) * fine.cos().clamp_min(0).pow(2 * beta - 1)
    areas = density[:-2:2] + 4 * density[1:-1:2] + density[2::2]
    summed = torch.cat((areas.new_zeros(1), areas.cumsum(0)))
    summed, angles = summed / summed[-1], fine[::2]

    def quantile(u: Tensor) -> Tensor:
        right = torch.searchsorted(summed, u.double(), right=True).clamp(1, _KNOTS - 1)
        low, high = summed[right - 1], summed[right]
        inside = (u.double() - low) / (high - low).clamp_min(1e-300)
        angle = angles[right - 1] + inside * (angles[right] - angles[right - 1])
        return angle.sin().square()

    return quantile


def logit_normal(u: Tensor, scale: float = 1.0) -> Tensor:
    """The logistic function of a normal quantile (Esser et al. 2024, arXiv 2403.03206, 3.1).

    Args:
        u: [B] in 0 … 1, fp64.
        scale: Standard deviation of the normal; larger reaches further to both ends.
    """
    return torch.sigmoid(scale * torch.special.ndtri(u))


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Sigma [B] moved towards 1 by a `shift` above 1 (Esser et al. 2024, 5.3.2)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def auto_shift(tokens: int, scheduler_config: Mapping[str, Any]) -> float:
    """The shift for a latent of `tokens`: its logarithm is linear in them, and not clamped.

    The two points of the line are the scheduler's own; without them FLUX.1's, which are what
    diffusers' flow scheduler assumes.
    """
    near = scheduler_config.get("base_image_seq_len", 256)
    far = scheduler_config.get("max_image_seq_len", 4096)
    low = scheduler_config.get("base_shift", 0.5)
    high = scheduler_config.get("max_shift", 1.15)
    return math.exp(low + (high - low) * (tokens - near) / (far - near))
