"""Training noise, drawn per sample so that it does not depend on who shares the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.core.seeds import Seeds
    from simpletuner.core.types import Sample


def noise_for(
    samples: Sequence[Sample], epoch: int, shape: tuple[int, ...], seeds: Seeds
) -> Tensor:
    """Standard normal noise for one micro-batch.

    Args:
        samples: The B draws.
        epoch: 0-based.
        shape: Of one latent: C, *S.
        seeds: Of the run.

    Returns:
        [B, C, *S] fp32 on the CPU; a function of (seed, epoch, sample, occurrence) alone.
    """
    noise = torch.empty(len(samples), *shape)
    for row, sample in zip(noise, samples, strict=True):
        generator = seeds.generator("noise", epoch, sample.occurrence, sample.dataset, sample.id)
        row.normal_(generator=generator)
    return noise
