"""Timesteps follow their declared law at every batch size and at every place in the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from simpletuner.core.seeds import Seeds
from simpletuner.diffusion.objective import Objective, objective_of
from simpletuner.diffusion.settings import DiffusionSettings
from simpletuner.diffusion.timesteps import beta_quantile, quantiles
from tests.unit.diffusion.test_losses import SDXL_BETAS

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


# ---- what is drawn how often


def counted(objective: Objective, batch: int, rounds: int) -> torch.Tensor:
    """How often each tenth of the schedule comes up in windows of `batch`."""
    found = torch.zeros(10)
    for step in range(rounds):
        t = objective.timesteps(quantiles(Seeds(5), step, batch), 1).double()
        found += torch.histc(t, 10, 0, 1000)
    return found


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize(
    ("strategy", "favoured"),
    [("none", None), ("earlier", (0, 250)), ("later", (750, 1000)), ("range", (300, 500))],
)
def test_a_bias_has_its_density_for_every_batch_size(
    batch: int, strategy: str, favoured: tuple[int, int] | None
) -> None:
    """Fault 4 of the field: chi-square over tenths; 9 degrees of freedom, 1 in 10,000 is 34."""
    settings = DiffusionSettings(
        timestep_bias_strategy=strategy,
        timestep_bias_multiplier=10.0,
        timestep_bias_begin=300,
        timestep_bias_end=500,
    )
    chances = torch.ones(1000, dtype=torch.float64)
    if favoured is not None:
        chances[slice(*favoured)] = 10
    wanted = (chances / chances.sum()).view(10, 100).sum(1)
    rounds = 4000 // batch
    found = counted(objective_of("epsilon", SDXL_BETAS, settings), batch, rounds)
    expected = wanted * rounds * batch
    assert float(((found - expected) ** 2 / expected).sum()) < 34


@pytest.mark.parametrize(
    ("alpha", "beta", "cumulative"),
    [
        (2.0, 2.0, lambda x: 3 * x**2 - 2 * x**3),
        (1.0, 3.0, lambda x: 1 - (1 - x) ** 3),
        (4.0, 1.0, lambda x: x**4),
        (0.5, 0.5, lambda x: 2 / torch.pi * x.sqrt().asin()),
    ],
)
def test_the_beta_quantile_inverts_the_closed_forms(
    alpha: float, beta: float, cumulative: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)
    x = beta_quantile(alpha, beta)(u)
    assert bool((x.diff() >= 0).all())
    torch.testing.assert_close(cumulative(x), u, atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_flow_model_draws_from_the_beta_distribution(batch: int) -> None:
    settings = DiffusionSettings(
        flow_use_beta_schedule=True,
        flow_beta_schedule_alpha=2.0,
        flow_beta_schedule_beta=2.0,
        flow_schedule_shift=1.0,
    )
    rounds = 4000 // batch
    found = counted(objective_of("flow_matching", {}, settings), batch, rounds)
    edges = torch.linspace(0, 1, 11, dtype=torch.float64)
    expected = (3 * edges**2 - 2 * edges**3).diff() * rounds * batch
    assert float(((found - expected) ** 2 / expected).sum()) < 34
