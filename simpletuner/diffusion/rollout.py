"""Scheduled sampling: inputs that the model made itself, as it will meet them in a sampler.

A sample is corrupted some timesteps before the one it is trained at, and the model steps it down
from there; so it learns to correct its own errors (Bengio et al. 2015, arXiv 1506.03099; for
diffusion Ning et al. 2023, arXiv 2308.15321).

Letters: B batch, C channels, *S = H,W; signal and spread are the shares of the clean latent and of
the noise, lambda = log(signal / spread).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from simpletuner.core.types import wide

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.core.seeds import Seeds
    from simpletuner.core.types import Draw, Sample
    from simpletuner.diffusion.objective import Objective
    from simpletuner.diffusion.settings import DiffusionSettings


@dataclass(frozen=True)
class Rollout:
    """Which samples are rolled out how far, and what comes of it.

    Args:
        settings: The ``scheduled_sampling_`` settings.
        objective: Of the run.
        seeds: Of the run.
    """

    settings: DiffusionSettings
    objective: Objective
    seeds: Seeds

    def lengths(self, samples: Sequence[Sample], epoch: int, step: int, t: Tensor) -> Tensor:
        """How many timesteps each of B samples is rolled out before `t`; [B] int64 on the CPU.

        No more than the schedule has above `t`, and none further from `t` than that is from the
        clean end: there little noise would have to stand for all that the model got wrong.
        """
        wanted = torch.zeros(len(samples), dtype=torch.long)
        if not self.settings.scheduled_sampling_max_step_offset:
            return wanted
        chance = self.probability(step)
        for place, sample in enumerate(samples):
            draw = (epoch, sample.occurrence, sample.dataset, sample.id)
            if self.seeds.uniform("rollout", *draw) < chance:
                wanted[place] = self._length(self.seeds.uniform("rollout length", *draw))
        above, below = (self.objective.last - t).floor().long(), t.floor().long()
        return torch.minimum(wanted, torch.minimum(above, below))

    def probability(self, step: int) -> float:
        """The share of samples that is rolled out at optimizer step `step`."""
        settings = self.settings
        if not settings.scheduled_sampling_ramp_steps:
            return settings.scheduled_sampling_probability
        gone = step - settings.scheduled_sampling_start_step
        done = min(max(gone / settings.scheduled_sampling_ramp_steps, 0.0), 1.0)
        if settings.scheduled_sampling_ramp_shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        first, last = settings.scheduled_sampling_prob_start, settings.scheduled_sampling_prob_end
        return first + (last - first) * done

    def _length(self, u: float) -> int:
        most = self.settings.scheduled_sampling_max_step_offset
        strategy = self.settings.scheduled_sampling_strategy
        if strategy == "uniform":
            return int(u * (most + 1))
        return round((u * u if strategy == "biased_early" else 1 - u * u) * most)

    def noise(
        self,
        clean: Tensor,
        t: Tensor,
        noise: Tensor,
        lengths: Tensor,
        answer: Callable[[Draw], Tensor],
    ) -> Tensor:
        """The noise in what the model makes of `clean` until `t`, so that clean stays the answer.

        Args:
            clean: [B, C, *S].
            t: [B], on the CPU.
            noise: [B, C, *S], that of the start.
            lengths: As above.
            answer: The model's prediction for a draw, [B, C, *S] fp32.
        """
        solver = _Solver.of(self.settings, self.objective, len(t))
        noisy = self.objective.draw(clean, t + lengths, noise).noisy
        with torch.no_grad():
            for left in range(int(lengths.max()), 0, -1):
                moves = lengths >= left
                now = t + lengths.clamp(max=left)
                draw = self.objective.draw(clean, now, noise)
                guess = self.objective.clean(
                    replace(draw, noisy=noisy), answer(replace(draw, noisy=noisy))
                )
                noisy = solver.down(noisy, guess, now, moves)
        signal, spread = (wide(share.float(), noisy) for share in self.objective.levels(t))
        rolled = (noisy - signal * clean.float()) / spread
        return torch.where(wide(lengths > 0, noisy), rolled, noise)


@dataclass
class _Solver:
    """One timestep down for those that move; each of B samples has a history of its own.

    Euler in (spread / signal), which is DDIM (Song et al. 2021, arXiv 2010.02502); DPM-Solver++(2M)
    (Lu et al. 2022, arXiv 2211.01095); UniPC (Zhao et al. 2023, arXiv 2302.04867, B2), which is the
    same with a corrector. Their coefficients follow from the timesteps, so they are reckoned in
    fp64 on the CPU.
    """

    objective: Objective
    second: bool
    corrects: bool
    taken: Tensor
    """[B] the steps each sample has behind it."""
    noisy: Tensor | None = None
    guesses: tuple[Tensor, ...] = ()
    """Clean latents at the points before, the last one first."""
    points: tuple[Tensor, ...] = ()
    """[B] timesteps of those."""

    @classmethod
    def of(cls, settings: DiffusionSettings, objective: Objective, count: int) -> _Solver:
        sampler = settings.scheduled_sampling_sampler
        second = sampler != "euler" and settings.scheduled_sampling_order > 1
        return cls(objective, second, sampler == "unipc", torch.zeros(count, dtype=torch.long))

    def down(self, noisy: Tensor, guess: Tensor, now: Tensor, moves: Tensor) -> Tensor:
        """From `noisy` at timesteps `now` [B], where `guess` is the clean latent, one down."""
        if self.corrects and self.points:
            noisy = self._corrected(noisy, guess, now)
        after = now - moves.long()
        ratio, gain, h = self._stride(now, after)
        answer = guess
        if self.second and self.points:
            share = h / self._stride(self.points[0], now)[2]
            share = torch.where(self.taken > 0, share, torch.zeros_like(share)) / 2
            answer = guess + self._wide(share, noisy) * (guess - self.guesses[0])
        self.noisy = noisy
        self.guesses, self.points = (guess, *self.guesses[:1]), (now, *self.points[:1])
        self.taken = self.taken + moves.long()
        moved = self._wide(ratio, noisy) * noisy + self._wide(gain, noisy) * answer
        return torch.where(wide(moves, noisy), moved, noisy)

    def _stride(self, now: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is left of the noisy latent, what comes of the clean one, and the step in lambda."""
        (signal, spread), (fine, rest) = self.objective.levels(now), self.objective.levels(after)
        h = (fine / rest).log() - (signal / spread).log()
        return rest / spread, -fine * torch.expm1(-h), h

    def _corrected(self, noisy: Tensor, guess: Tensor, now: Tensor) -> Tensor:
        """`noisy` once more from the point before, now that the answer at its end is known."""
        assert self.noisy is not None
        before, last = self.points[0], self.guesses[0]
        ratio, gain, h = self._stride(before, now)
        half = torch.full_like(h, 0.5)
        new, old = half, torch.zeros_like(h)
        bend = torch.zeros_like(noisy)
        if self.second and len(self.points) > 1:
            r = self._stride(self.points[1], before)[2] / -h  # below 0: behind, in steps of h
            phi = torch.expm1(-h)
            once = phi / -h - 1
            twice = 2 * (once / -h - 0.5)
            old = (once - twice) / phi / (1 - r)
            new = once / phi - old
            has = self.taken > 1
            old = torch.where(has, old / r, torch.zeros_like(h))
            new = torch.where(has, new, half)
            bend = self._wide(old, noisy) * (self.guesses[1] - last)
        bend = bend + self._wide(new, noisy) * (guess - last)
        better = self._wide(ratio, noisy) * self.noisy + self._wide(gain, noisy) * (last + bend)
        return torch.where(wide(self.taken > 0, noisy), better, noisy)

    def _wide(self, values: Tensor, like: Tensor) -> Tensor:
        return wide(values.float(), like)
