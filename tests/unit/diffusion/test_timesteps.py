"""Timesteps follow their declared law at every batch size and at every place in the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from simpletuner.core.seeds import Seeds
from simpletuner.diffusion.distributions import beta_quantile, cubic_quantile
from simpletuner.diffusion.objective import Objective, objective_of
from simpletuner.diffusion.settings import DiffusionSettings
from simpletuner.diffusion.timesteps import Quantiles, quantiles
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


def counted(
    objective: Objective,
    batch: int,
    rounds: int,
    settings: DiffusionSettings | None = None,
    offset: float = 0.0,
) -> torch.Tensor:
    """How often each tenth of the schedule comes up in windows of `batch`."""
    found, draw = torch.zeros(10), Quantiles(settings or DiffusionSettings(), Seeds(5))
    for step in range(rounds):
        t = objective.timesteps(draw(step, batch), 1, offset).double()
        found += torch.histc(t, 10, 0, 1000)
    return found


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize(
    ("strategy", "favoured"),
    [("none", None), ("earlier", (0, 250)), ("later", (750, 1000)), ("range", (300, 500))],
)
@pytest.mark.parametrize("stratified", [True, False])
def test_a_bias_has_its_density_for_every_batch_size(
    batch: int, strategy: str, favoured: tuple[int, int] | None, stratified: bool
) -> None:
    """Fault 4 of the field: chi-square over tenths; 9 degrees of freedom, 1 in 10,000 is 34."""
    settings = DiffusionSettings(
        timestep_bias_strategy=strategy,
        timestep_bias_multiplier=10.0,
        timestep_bias_begin=300,
        timestep_bias_end=500,
        disable_segmented_timestep_sampling=not stratified,
    )
    chances = torch.ones(1000, dtype=torch.float64)
    if favoured is not None:
        chances[slice(*favoured)] = 10
    wanted = (chances / chances.sum()).view(10, 100).sum(1)
    rounds = 4000 // batch
    found = counted(objective_of("epsilon", SDXL_BETAS, settings), batch, rounds, settings)
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


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_flow_model_draws_from_a_curve_of_weights(batch: int) -> None:
    settings = DiffusionSettings(flow_cubic_schedule_weights=[1, 3], flow_schedule_shift=1.0)
    rounds = 4000 // batch
    found = counted(objective_of("flow_matching", {}, settings), batch, rounds)
    edges = torch.linspace(0, 1, 11, dtype=torch.float64)
    expected = ((edges + edges**2) / 2).diff() * rounds * batch  # the density (1 + 2x) / 2
    assert float(((found - expected) ** 2 / expected).sum()) < 34


def test_a_curve_goes_through_its_weights_and_does_not_overshoot() -> None:
    """The density, by differences of the quantiles, is that of SciPy's PchipInterpolator."""
    u = torch.linspace(0, 1, 400_001, dtype=torch.float64)
    x = cubic_quantile([0.0, 1.0, 1.0, 4.0, 0.5])(u)
    middle, density = (x[1:] + x[:-1]) / 2, 1 / (x.diff() * 400_000)
    at = torch.searchsorted(middle, torch.linspace(0.05, 0.95, 10, dtype=torch.float64))
    curve = [0.296, 0.792, 1.0, 1.0, 1.0, 1.312, 2.944, 4.0, 3.416, 1.728]
    area = 1.734375
    wanted = torch.tensor(curve, dtype=torch.float64) / area
    torch.testing.assert_close(density[at], wanted, rtol=2e-3, atol=0)
    assert float(density.max()) <= 4.0 / area * 1.001


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("inverted", [False, True])
def test_an_expert_is_trained_at_its_share_of_the_schedule_alone(
    batch: int, inverted: bool
) -> None:
    settings = DiffusionSettings(
        refiner_training=True,
        refiner_training_strength=0.3,
        refiner_training_invert_schedule=inverted,
        timestep_bias_strategy="earlier",
        timestep_bias_portion=0.1,
        timestep_bias_multiplier=3.0,
    )
    found = counted(objective_of("epsilon", SDXL_BETAS, settings), batch, 4000 // batch)
    wanted = torch.tensor([0.0] * 3 + [1.0] * 7 if inverted else [3.0, 1, 1] + [0.0] * 7)
    assert bool((found[wanted == 0] == 0).all())
    expected = (wanted / wanted.sum() * found.sum())[wanted > 0]
    assert float(((found[wanted > 0] - expected) ** 2 / expected).sum()) < 30


def trained_at(settings: DiffusionSettings, batch: int, rounds: int) -> list[float]:
    objective = objective_of("flow_matching", {}, settings)
    draw = Quantiles(settings, Seeds(5))
    drawn = [objective.timesteps(draw(step, batch), 1) for step in range(rounds)]
    return [round(t, 6) for t in torch.cat(drawn).tolist()]


@pytest.mark.parametrize("listed", [[1000, 750, 250], "1000,750,250", [1.0, 0.75, 0.25]])
def test_a_list_of_timesteps_is_drawn_evenly_and_not_shifted(listed: object) -> None:
    settings = DiffusionSettings(flow_custom_timesteps=listed, flow_schedule_shift=3.0)
    found = trained_at(settings, 3, 100)
    assert {t: found.count(t) for t in set(found)} == {1000.0: 100, 750.0: 100, 250.0: 100}
    assert found[:30] != sorted(found[:30])


def test_a_list_is_gone_through_in_its_order_over_all_windows() -> None:
    settings = DiffusionSettings(
        flow_custom_timesteps=[900, 100, 500], flow_timesteps_mode="round-robin"
    )
    assert trained_at(settings, 2, 4) == [900, 100, 500, 900, 100, 500, 900, 100]


def test_the_fast_schedule_has_schnells_four_timesteps() -> None:
    found = trained_at(DiffusionSettings(flux_fast_schedule=True), 10, 50)
    counts = {t: found.count(t) for t in set(found)}
    assert counts == {1000.0: 350, 750.0: 50, 500.0: 50, 250.0: 50}


def test_draws_of_their_own_are_not_spread_over_the_window() -> None:
    draw = Quantiles(DiffusionSettings(disable_segmented_timestep_sampling=True), Seeds(1))
    means = torch.stack([draw(step, 8).mean() for step in range(500)])
    assert float(means.std()) == pytest.approx(0.102, rel=0.15)  # 1 / sqrt(12 · 8)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, -0.5), (2.0, 1.0)])
def test_a_dataset_moves_its_logit_normal_law(scale: float, offset: float) -> None:
    settings = DiffusionSettings(flow_sigmoid_scale=scale, flow_schedule_shift=1.0)
    found = counted(objective_of("flow_matching", {}, settings), 4, 1000, offset=offset)
    edges = torch.linspace(0, 1, 11, dtype=torch.float64)
    cumulative = torch.special.ndtr(edges.logit() / scale - offset)
    expected = cumulative.diff() * 4000
    assert float(((found - expected) ** 2 / expected).sum()) < 34


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"flow_custom_timesteps": [1200]}, "timesteps are from 0 to 1000"),
        ({"flow_custom_timesteps": []}, "at least 1 item"),
        ({"flow_cubic_schedule_weights": [0, 0, 0]}, "one of them is above"),
        ({"flow_cubic_schedule_weights": [1, -1]}, "weights are not below 0"),
        ({"flow_cubic_schedule_weights": [1]}, "at least 2 items"),
    ],
)
def test_a_list_that_is_no_law_is_refused(settings: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        DiffusionSettings(**settings)  # type: ignore[arg-type]
