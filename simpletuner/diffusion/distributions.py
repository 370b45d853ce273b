"""Distributions over the noise schedule, each by its quantile function.

Letters: B in the batch; u are quantiles in [0, 1), fp64; sigma is the share of noise in 0 … 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    Quantile = Callable[[Tensor], Tensor]


def logit_normal(u: Tensor, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    """The logistic function of a normal quantile (Esser et al. 2024, arXiv 2403.03206, 3.1).

    Args:
        u: [B].
        scale: Standard deviation of the normal; larger reaches further to both ends.
        offset: Its mean, in standard deviations; below 0 draws less noise.
    """
    return torch.sigmoid(scale * (torch.special.ndtri(u) + offset))


_CELLS = 8192


def beta_quantile(alpha: float, beta: float) -> Quantile:
    """The inverse of the Beta distribution's cumulative function, off by less than 1e-6.

    With x = sin^2(a) the density over the angle is ``2 sin(a)^(2 alpha - 1) cos(a)^(2 beta - 1)``,
    which has no poles for parameters of 1/2 and more.

    Args:
        alpha: At least 1/2.
        beta: The same.
    """
    angle = torch.linspace(0, math.pi / 2, 2 * _CELLS + 1, dtype=torch.float64)
    density = angle.sin().pow(2 * alpha - 1) * angle.cos().clamp_min(0).pow(2 * beta - 1)
    quantile = _inverse(angle, density)
    return lambda u: quantile(u).sin().square()


def cubic_quantile(weights: Sequence[float]) -> Quantile:
    """The quantiles of a density through `weights` at equal distances over 0 … 1.

    Between them it is a monotone cubic (Fritsch & Carlson 1980, with the slopes of Fritsch &
    Butland 1984), so it is nowhere above or below the weights beside it; of two, a line.

    Args:
        weights: At least two, none below 0, not all 0; their scale does not matter.
    """
    knots = torch.tensor(weights, dtype=torch.float64)
    rises = knots.diff()  # per interval, as are the slopes
    slopes = torch.cat((_end_slope(rises), _inner_slopes(rises), _end_slope(rises.flip(0))))
    x = torch.linspace(0, 1, 2 * _CELLS + 1, dtype=torch.float64)
    place = x * len(rises)
    left = place.long().clamp(max=len(rises) - 1)
    t = place - left
    # Hermite's cubic as a line and what bends it at both ends
    from_left, from_right = slopes[left] - rises[left], slopes[left + 1] - rises[left]
    bend = t * (1 - t) * (from_left * (1 - t) - from_right * t)
    density = knots[left] + t * rises[left] + bend
    return _inverse(x, density.clamp_min(0))


def _inner_slopes(rises: Tensor) -> Tensor:
    """The harmonic mean of the rises on both sides; 0 where they have not one sign."""
    before, after = rises[:-1], rises[1:]
    together = before * after
    mean = 2 * together / (before + after)
    return torch.where(together > 0, mean, torch.zeros_like(mean))


def _end_slope(rises: Tensor) -> Tensor:
    """The first slope, [1]: that of a parabola through three knots, kept from overshooting."""
    if len(rises) == 1:
        return rises
    first, second = float(rises[0]), float(rises[1])
    slope = (3 * first - second) / 2
    if slope * first <= 0:
        slope = 0.0
    elif first * second < 0 and abs(slope) > 3 * abs(first):
        slope = 3 * first
    return rises.new_tensor([slope])


def _inverse(points: Tensor, density: Tensor) -> Quantile:
    """The quantile function of a density at an odd number of equidistant points, by Simpson."""
    areas = density[:-2:2] + 4 * density[1:-1:2] + density[2::2]
    summed = torch.cat((areas.new_zeros(1), areas.cumsum(0)))
    summed, ends = summed / summed[-1], points[::2]

    def quantile(u: Tensor) -> Tensor:
        right = torch.searchsorted(summed, u.double(), right=True).clamp(1, len(ends) - 1)
        low, high = summed[right - 1], summed[right]
        inside = (u.double() - low) / (high - low).clamp_min(1e-300)
        return ends[right - 1] + inside * (ends[right] - ends[right - 1])

    return quantile


def list_quantile(levels: Sequence[float]) -> Quantile:
    """Each of `levels` equally often."""
    listed = torch.tensor(levels, dtype=torch.float64)
    return lambda u: listed[(u.double() * len(listed)).long().clamp(max=len(listed) - 1)]


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
