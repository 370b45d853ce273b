"""Training noise, drawn per sample so that it does not depend on who shares the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.core.seeds import Seeds
    from simpletuner.core.types import Sample
    from simpletuner.diffusion.settings import DiffusionSettings


def noise_for(
    samples: Sequence[Sample],
    epoch: int,
    shape: tuple[int, ...],
    seeds: Seeds,
    purpose: str = "noise",
) -> Tensor:
    """Standard normal noise for one micro-batch.

    Args:
        samples: The B draws.
        epoch: 0-based.
        shape: Of one latent: C, *S.
        seeds: Of the run.
        purpose: What it is for; another one is other noise.

    Returns:
        [B, C, *S] fp32 on the CPU; a function of (seed, epoch, sample, occurrence) alone.
    """
    noise = torch.empty(len(samples), *shape)
    for row, sample in zip(noise, samples, strict=True):
        generator = seeds.generator(purpose, epoch, sample.occurrence, sample.dataset, sample.id)
        row.normal_(generator=generator)
    return noise


@dataclass(frozen=True)
class Noises:
    """The noise of a run: what is predicted, and what the denoiser sees.

    Args:
        settings: Offsets and perturbation.
        seeds: Of the run.
    """

    settings: DiffusionSettings
    seeds: Seeds

    def draw(
        self, samples: Sequence[Sample], epoch: int, shape: tuple[int, ...], step: int
    ) -> tuple[Tensor, Tensor | None]:
        """The noise of B draws, and what takes its place in the denoiser's input, if anything does.

        Args:
            samples: The draws.
            epoch: 0-based.
            shape: Of one latent: C, *S.
            step: The optimizer step, from 0.

        Returns:
            [B, C, *S] fp32 on the CPU each.
        """
        noise = noise_for(samples, epoch, shape, self.seeds)
        if self.settings.offset_noise:
            noise = noise + self._offsets(samples, epoch, shape)
        strength = self._perturbation(step)
        if not strength:
            return noise, None
        other = noise_for(samples, epoch, shape, self.seeds, "input perturbation")
        return noise, noise + strength * other

    def _offsets(self, samples: Sequence[Sample], epoch: int, shape: tuple[int, ...]) -> Tensor:
        """[B, C, 1, …] one number for each channel, 0 for a sample that is left alone."""
        flat = (shape[0], *[1] * (len(shape) - 1))
        offsets = noise_for(samples, epoch, flat, self.seeds, "noise offset")
        for row, sample in zip(offsets, samples, strict=True):
            draw = (epoch, sample.occurrence, sample.dataset, sample.id)
            chance = self.seeds.uniform("noise offset chance", *draw)
            row *= self.settings.noise_offset * (chance < self.settings.noise_offset_probability)
        return offsets

    def _perturbation(self, step: int) -> float:
        """The strength at a step: falls in a line to 0, or stays."""
        settings = self.settings
        if not settings.input_perturbation_steps:
            return settings.input_perturbation
        left = 1 - step / settings.input_perturbation_steps
        return settings.input_perturbation * max(left, 0.0)
