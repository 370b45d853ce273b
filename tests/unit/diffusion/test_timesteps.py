"""Timesteps follow their declared law at every batch size and at every place in the batch."""

from __future__ import annotations

import pytest
import torch

from simpletuner.core.seeds import Seeds
from simpletuner.diffusion.objective import objective_of
from simpletuner.diffusion.timesteps import quantiles

BINS = 20


def timesteps(batch: int, steps: int) -> torch.Tensor:
    """[steps, batch], drawn as the trainer draws them."""
    objective = objective_of("epsilon", {"beta_schedule": "scaled_linear"})
    seeds = Seeds(42)
    return torch.stack(
        [objective.timesteps(quantiles(seeds, s, batch), 1024) for s in range(steps)]
    )


def chi_square(t: torch.Tensor) -> float:
    """Against a uniform law over 1000 timesteps, in 20 bins: 19 degrees of freedom."""
    counts = (t.flatten() * BINS // 1000).bincount(minlength=BINS).double()
    expected = t.numel() / BINS
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_timesteps_are_uniform_over_many_steps(batch: int) -> None:
    # 43.8 is passed by one uniform law in a thousand; a biased one is far beyond
    assert chi_square(timesteps(batch, 4000 // batch)) < 43.8


@pytest.mark.parametrize("batch", [2, 8])
def test_timesteps_are_uniform_at_each_place_in_the_batch(batch: int) -> None:
    t = timesteps(batch, 2000)

    assert max(chi_square(t[:, place]) for place in range(batch)) < 43.8


@pytest.mark.parametrize("total", [1, 2, 5, 64])
def test_each_slice_of_the_schedule_is_drawn_once_in_a_window(total: int) -> None:
    for step in range(20):
        u = quantiles(Seeds(1), step, total)

        assert sorted((u * total).long().tolist()) == list(range(total))
        assert 0 <= float(u.min()) <= float(u.max()) < 1


def test_stratified_draws_steady_the_mean_of_a_window() -> None:
    windows = torch.stack([quantiles(Seeds(1), step, 8) for step in range(500)])

    # independent draws have 1/sqrt(12 · 8) = 0.102, one in each eighth 1/sqrt(12 · 8^3) = 0.0128
    assert float(windows.mean(1).std()) == pytest.approx(0.01276, rel=0.15)


def test_quantiles_depend_on_seed_and_step_alone() -> None:
    first = quantiles(Seeds(1), 3, 8)
    torch.rand(5)

    assert torch.equal(first, quantiles(Seeds(1), 3, 8))
    assert not torch.equal(first, quantiles(Seeds(1), 4, 8))
    assert not torch.equal(first, quantiles(Seeds(2), 3, 8))
