"""Rollouts against diffusers' own samplers, one timestep at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from simpletuner.core.seeds import Seeds
from simpletuner.core.types import Draw, Geometry, Sample
from simpletuner.diffusion.objective import Objective, objective_of
from simpletuner.diffusion.rollout import Rollout
from simpletuner.diffusion.settings import DiffusionSettings
from tests.unit.diffusion.test_losses import SDXL_BETAS

KINDS = ("epsilon", "v_prediction", "sample")
ZERO = {"rescale_betas_zero_snr": True}


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def samples(count: int) -> list[Sample]:
    whole = Geometry((64, 64), (64, 64), (0, 0, 64, 64))
    return [Sample(f"{n:032x}", "set", f"{n}.png", "a", whole) for n in range(count)]


def rollout(objective: Objective, most: int = 8, **settings: Any) -> Rollout:
    settings = {
        "scheduled_sampling_max_step_offset": most,
        "scheduled_sampling_probability": 1.0,
        **{f"scheduled_sampling_{name}": value for name, value in settings.items()},
    }
    return Rollout(DiffusionSettings(**settings), objective, Seeds(3))


def model(draw: Draw) -> torch.Tensor:
    """An answer that depends on both what it sees and the timestep it is told."""
    t = (draw.timestep / 1000).view(-1, 1, 1, 1)
    return 0.7 * torch.sin(2 * draw.noisy) + t * draw.noisy.flip(-1) - 0.2 * t.square()


def stock(sampler: str, order: int, kind: str, **more: Any) -> Any:
    import diffusers

    own = {**SDXL_BETAS, "prediction_type": kind, **more}
    if sampler == "euler":
        return diffusers.DDIMScheduler.from_config(own, clip_sample=False, set_alpha_to_one=False)
    name = {"dpm": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}[sampler]
    return getattr(diffusers, name).from_config(
        own, solver_order=order, lower_order_final=False, timestep_spacing="leading"
    )


def by_diffusers(scheduler: Any, noisy: torch.Tensor, start: int, steps: int) -> torch.Tensor:
    """One sample down from `start` by as many timesteps, with a schedule of every one."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_timesteps(999)
        scheduler.set_begin_index(999 - start)
    else:
        scheduler.set_timesteps(1000)
    assert scheduler.timesteps.tolist()[:999] == list(range(999, 0, -1))
    for t in range(start, start - steps, -1):
        at = torch.tensor([float(t)])
        draw = Draw(noisy, noisy, noisy, at, at, at)
        noisy = scheduler.step(model(draw), t, noisy, return_dict=False)[0]
    return noisy


@pytest.mark.parametrize(
    ("sampler", "order"), [("euler", 2), ("dpm", 1), ("dpm", 2), ("unipc", 1), ("unipc", 2)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_model_makes_is_what_diffusers_makes_of_it(
    sampler: str, order: int, kind: str
) -> None:
    """Samples of unequal lengths at once, each as if it were alone in diffusers' sampler."""
    objective = objective_of(kind, SDXL_BETAS)
    clean, noise = some(5, 2, 4, 4), some(5, 2, 4, 4, seed=1)
    t, lengths = torch.tensor([600, 37, 300, 981, 500]), torch.tensor([7, 3, 1, 6, 0])

    rolled = rollout(objective, sampler=sampler, order=order).noise(clean, t, noise, lengths, model)

    ours = objective.draw(clean, t, rolled).noisy
    for row, (place, length) in enumerate(zip(t.tolist(), lengths.tolist(), strict=True)):
        start = objective.draw(clean[row : row + 1], torch.tensor([place + length]), noise[row])
        wanted = by_diffusers(stock(sampler, order, kind), start.noisy, place + length, length)
        torch.testing.assert_close(ours[row : row + 1], wanted, atol=2e-5, rtol=2e-5)
    assert torch.equal(rolled[4], noise[4])
    assert (rolled[0] - noise[0]).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", ["euler", "dpm", "unipc"])
def test_a_rollout_may_start_where_there_is_nothing_but_noise(sampler: str) -> None:
    objective = objective_of("v_prediction", {**SDXL_BETAS, **ZERO})
    clean, noise = some(1, 2, 4, 4), some(1, 2, 4, 4, seed=1)
    t, lengths = torch.tensor([995]), torch.tensor([4])
    rolled = rollout(objective, sampler=sampler).noise(clean, t, noise, lengths, model)
    assert bool(rolled.isfinite().all())
    # the first step, from pure noise, is DDIM's in closed form for all three
    once = rollout(objective, sampler=sampler)
    first = once.noise(clean, torch.tensor([998]), noise, torch.tensor([1]), model)
    at = torch.tensor([999.0])
    signal, spread = (share.float() for share in objective.levels(torch.tensor([998])))
    guess = -model(Draw(noise, noise, noise, at, at, at))  # v is -x0 in pure noise
    torch.testing.assert_close(
        objective.draw(clean, torch.tensor([998]), first).noisy,
        signal * guess + spread * noise,
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("sampler", ["euler", "dpm", "unipc"])
@pytest.mark.parametrize("kind", [*KINDS, "flow_matching"])
def test_a_model_that_knows_the_answer_changes_nothing(sampler: str, kind: str) -> None:
    objective = objective_of(kind, SDXL_BETAS if kind != "flow_matching" else {})
    clean, noise = some(3, 2, 4, 4), some(3, 2, 4, 4, seed=1)
    t = torch.tensor([20, 500, 900])
    t = t if kind != "flow_matching" else t + 0.25

    def knows(draw: Draw) -> torch.Tensor:
        return objective.draw(clean, draw.timestep.cpu().to(t.dtype), noise).target

    rolled = rollout(objective, sampler=sampler).noise(
        clean, t, noise, torch.tensor([6] * 3), knows
    )

    torch.testing.assert_close(rolled, noise, atol=2e-3, rtol=0)


def test_a_flow_model_is_stepped_by_the_stock_euler() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    objective = objective_of("flow_matching", {})
    clean, noise = some(1, 2, 4, 4), some(1, 2, 4, 4, seed=1)
    t = torch.tensor([400.5], dtype=torch.float64)
    rolled = rollout(objective, sampler="euler").noise(clean, t, noise, torch.tensor([5]), model)

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[(400.5 + left) / 1000 for left in range(5, -1, -1)])
    noisy = objective.draw(clean, t + 5, noise).noisy
    for told in scheduler.timesteps[:5]:
        at = told.float().view(1)
        noisy = scheduler.step(model(Draw(noisy, noisy, noisy, at, at, at)), told, noisy)[0]
    torch.testing.assert_close(objective.draw(clean, t, rolled).noisy, noisy, atol=1e-5, rtol=1e-5)


def test_a_step_costs_one_prediction_for_each_timestep_of_the_longest() -> None:
    objective, heard = objective_of("epsilon", SDXL_BETAS), []

    def listens(draw: Draw) -> torch.Tensor:
        heard.append(draw.timestep.tolist())
        assert not torch.is_grad_enabled()
        return model(draw)

    clean, noise = some(2, 2, 4, 4), some(2, 2, 4, 4, seed=1)
    t, lengths = torch.tensor([10, 20]), torch.tensor([1, 3])
    rollout(objective).noise(clean, t, noise, lengths, listens)
    assert heard == [[11, 23], [11, 22], [11, 21]]


# ---- who is rolled out, and how far


@pytest.mark.parametrize(
    ("strategy", "mean"), [("uniform", 5.0), ("biased_early", 10 / 3), ("biased_late", 20 / 3)]
)
def test_lengths_follow_their_strategy(strategy: str, mean: float) -> None:
    found = rollout(objective_of("epsilon", SDXL_BETAS), most=10, strategy=strategy).lengths(
        samples(4000), 0, 0, torch.full((4000,), 500)
    )
    assert (int(found.min()), int(found.max())) == (0, 10)
    assert float(found.double().mean()) == pytest.approx(mean, abs=0.15)
    if strategy == "uniform":
        counts = found.bincount().double()
        assert float(((counts - 4000 / 11) ** 2 / (4000 / 11)).sum()) < 36  # 10 degrees of freedom


def test_a_length_belongs_to_the_draw_and_not_to_its_batch() -> None:
    rolls = rollout(objective_of("epsilon", SDXL_BETAS), probability=0.5)
    many, t = samples(40), torch.full((40,), 500)
    together = rolls.lengths(many, 2, 0, t)
    alone = [int(rolls.lengths([one], 2, 0, t[:1])) for one in many]
    assert together.tolist() == alone
    assert together.tolist() != rolls.lengths(many, 3, 0, t).tolist()
    again = [replace(one, occurrence=1) for one in many]
    assert together.tolist() != rolls.lengths(again, 2, 0, t).tolist()


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_a_share_of_the_samples_is_rolled_out(probability: float) -> None:
    rolls = rollout(
        objective_of("epsilon", SDXL_BETAS),
        probability=probability,
        strategy="biased_late",
        most=500,
    )
    found = rolls.lengths(samples(2000), 0, 0, torch.full((2000,), 499))
    assert float((found > 0).double().mean()) == pytest.approx(probability, abs=0.03)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ("linear", [0.1, 0.1, 0.1, 0.2, 0.3, 0.5, 0.5]),
        ("cosine", [0.1, 0.1, 0.1, 0.1 + 0.4 * 0.14644660940672624, 0.3, 0.5, 0.5]),
    ],
)
def test_the_share_rises_along_its_ramp(shape: str, wanted: list[float]) -> None:
    rolls = rollout(
        objective_of("epsilon", SDXL_BETAS),
        ramp_steps=40,
        start_step=10,
        prob_start=0.1,
        prob_end=0.5,
        ramp_shape=shape,
    )
    found = [rolls.probability(step) for step in (0, 9, 10, 20, 30, 50, 500)]
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("kind", "t", "lengths"),
    [
        ("epsilon", [0, 3, 500, 996, 999], [0, 3, 9, 3, 0]),
        ("flow_matching", [0.5, 3.9, 500.0, 996.1, 1000.0], [0, 3, 9, 3, 0]),
    ],
)
def test_a_rollout_stays_in_the_schedule(kind: str, t: list[float], lengths: list[int]) -> None:
    objective = objective_of(kind, SDXL_BETAS if kind == "epsilon" else {})
    rolls = rollout(objective, most=9)
    long = [one for one in samples(900) if rolls.lengths([one], 0, 0, torch.tensor([500])) == 9]
    times = torch.tensor(t)
    found = rolls.lengths(long[:5], 0, 0, times.long() if kind == "epsilon" else times)
    assert found.tolist() == lengths
