"""What every learning rate schedule promises, and closed forms against torch and transformers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from simpletuner.optim.schedules import SCHEDULES, learning_rate
from simpletuner.optim.settings import OptimizerSettings

BUILT = [name for name, row in SCHEDULES.items() if not row.pending]
WARMING = [name for name in BUILT if SCHEDULES[name].fact("warmup")]
FALLING = [name for name in BUILT if SCHEDULES[name].fact("falls")]
BASE, END = 3e-4, 4e-7


def trace(name: str, total: int, **more: Any) -> list[float]:
    """The rates of a whole run."""
    numbers = {"base": BASE, "warmup": 0, "end": END, "power": 0.8, "cycles": 1, **more}
    return [learning_rate(name, step, total=total, **numbers) for step in range(total)]


def stock(make: Any, total: int) -> list[float]:
    """The rates that a stock scheduler gives a run of torch's."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    scheduler = make(optimizer)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_the_rate_is_positive_and_never_above_its_base(name: str, warmup: int) -> None:
    rates = trace(name, 40, warmup=warmup)

    assert all(0 < rate <= BASE for rate in rates)
    assert max(rates) == BASE


@pytest.mark.parametrize("name", WARMING)
def test_the_warm_up_is_a_line_from_nought_to_the_base(name: str) -> None:
    rates = trace(name, 40, warmup=8)

    assert rates[:8] == pytest.approx([BASE * n / 8 for n in range(1, 9)], rel=1e-12)


@pytest.mark.parametrize("name", FALLING)
@pytest.mark.parametrize(("total", "warmup"), [(2, 0), (40, 0), (40, 1), (40, 39), (1000, 100)])
def test_a_falling_rate_is_at_its_end_in_the_last_step_exactly(
    name: str, total: int, warmup: int
) -> None:
    assert trace(name, total, warmup=warmup)[-1] == END


@pytest.mark.parametrize("name", FALLING)
def test_a_falling_rate_falls_in_every_step_after_the_warm_up(name: str) -> None:
    rates = trace(name, 60, warmup=10)

    assert rates[9] == BASE
    assert all(before > after for before, after in pairwise(rates[9:]))


@pytest.mark.parametrize("name", BUILT)
def test_the_rate_stays_at_its_last_value_after_the_end(name: str) -> None:
    numbers: dict[str, Any] = {"base": BASE, "warmup": 3, "end": END, "power": 2.0, "cycles": 1}

    last, later = (learning_rate(name, step, total=20, **numbers) for step in (19, 500))

    assert last == later


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("total", [1, 5])
def test_a_warm_up_that_is_longer_than_the_run_does_no_harm(name: str, total: int) -> None:
    rates = trace(name, total, warmup=100)

    assert all(before <= after for before, after in pairwise(rates))
    assert 0 < rates[-1] <= BASE


def test_constant_is_constant_and_constant_with_warmup_is_it_after_the_warm_up() -> None:
    assert trace("constant", 20) == [BASE] * 20
    assert trace("constant", 20, warmup=5) == [BASE] * 20
    assert trace("constant_with_warmup", 20, warmup=0) == [BASE] * 20
    assert trace("constant_with_warmup", 20, warmup=5)[4:] == [BASE] * 16


@pytest.mark.parametrize("power", [0.8, 1.0, 2.0])
def test_polynomial_is_transformers_polynomial_read_at_the_end_of_each_step(power: float) -> None:
    from transformers import get_polynomial_decay_schedule_with_warmup as polynomial

    expected = stock(lambda o: polynomial(o, 10, 50, lr_end=END, power=power), 51)

    assert trace("polynomial", 50, warmup=10, power=power) == pytest.approx(expected[1:], rel=1e-9)


def test_linear_is_transformers_linear_read_at_the_end_of_each_step() -> None:
    from transformers import get_linear_schedule_with_warmup as linear

    expected = stock(lambda o: linear(o, 10, 50), 51)

    assert trace("linear", 50, warmup=10, end=0.0) == pytest.approx(expected[1:], abs=1e-15)


@pytest.mark.parametrize("cycles", [1, 2, 3])
def test_cosine_is_transformers_cosine_of_an_odd_number_of_halves(cycles: int) -> None:
    from transformers import get_cosine_schedule_with_warmup as cosine

    halves = 2 * cycles - 1
    expected = stock(lambda o: cosine(o, 10, 50, num_cycles=halves / 2), 51)

    found = trace("cosine", 50, warmup=10, end=0.0, cycles=cycles)

    assert found == pytest.approx(expected[1:], abs=1e-15)


def test_cosine_without_warm_up_is_torch_s_annealing() -> None:
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR

    expected = stock(lambda o: annealing(o, T_max=49, eta_min=END), 50)

    assert trace("cosine", 50) == pytest.approx(expected, rel=1e-9)


def test_cosine_is_half_way_down_in_the_middle_of_the_run() -> None:
    rates = trace("cosine", 101)

    assert rates[50] == pytest.approx((BASE + END) / 2, rel=1e-12)
    assert rates[25] == pytest.approx(END + (BASE - END) * (2 + math.sqrt(2)) / 4, rel=1e-12)


@pytest.mark.parametrize("cycles", [1, 2, 5])
@pytest.mark.parametrize("warmup", [0, 7])
def test_the_curves_are_their_formulas_at_every_step(cycles: int, warmup: int) -> None:
    """Fault 2 of the field: a cosine that is none, restarts that are constant."""
    total, top = 101, max(warmup, 1)
    for name, shape in (
        ("cosine_with_restarts", lambda p: 0.5 * (1 + math.cos(math.pi * (cycles * p % 1)))),
        ("sine", lambda p: 0.5 * (1 + math.cos(2 * math.pi * cycles * p))),
        ("rex", lambda p: (1 - p) / (1 - p / 2)),
    ):
        rates = trace(name, total, warmup=warmup, cycles=cycles)
        for n in range(top, total):
            share = shape((n - top) / (total - top))
            assert rates[n - 1] == pytest.approx(END + (BASE - END) * share, abs=1e-12), (name, n)
    last = {name: trace(name, total, warmup=warmup, cycles=cycles)[-1] for name in BUILT}
    assert last["sine"] == pytest.approx(BASE)
    assert last["cosine_with_restarts"] == last["rex"] == END


@pytest.mark.parametrize(("said", "steps"), [(0.05, 20), (0.5, 200), (0, 0), (30, 30), (30.0, 30)])
def test_a_warm_up_below_one_is_a_share_of_the_run(said: float, steps: int) -> None:
    assert OptimizerSettings(lr_warmup_steps=said).warmup_of(400) == steps


def test_a_warm_up_of_one_step_and_a_half_is_refused() -> None:
    with pytest.raises(ValueError, match="a whole number of steps, or a share below 1"):
        OptimizerSettings(lr_warmup_steps=1.5)
