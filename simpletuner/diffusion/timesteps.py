"""Where on the noise schedule each sample of a window is trained. N samples in the window."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.core.seeds import Seeds


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
