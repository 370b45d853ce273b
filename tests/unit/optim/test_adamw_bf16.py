"""adamw_bf16 against torch's AdamW, closed forms, and what rounding must not do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from simpletuner.core.errors import ConfigError
from simpletuner.optim.adamw_bf16 import AdamWBF16, round_stochastically


def parameters(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (8, 4), "b": (4, 16), "c": (32,)}
    return {
        name: Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in shapes.items()
    }


def optimizer_of(named: dict[str, Parameter], **numbers: Any) -> AdamWBF16:
    group = {"params": list(named.values()), "names": list(named)}
    return AdamWBF16([group], **{"lr": 1e-3, **numbers})


def give(named: dict[str, Parameter], step: int) -> None:
    """Gradients that differ by step, with one loud step now and then."""
    for place, parameter in enumerate(named.values()):
        generator = torch.Generator().manual_seed(1000 * step + place)
        scale = 100.0 if step % 17 == 0 else 0.1
        gradient = torch.randn(parameter.shape, generator=generator) * scale
        parameter.grad = gradient.to(parameter.dtype)


def run(
    optimizer: torch.optim.Optimizer, named: dict[str, Parameter], steps: Sequence[int]
) -> None:
    for step in steps:
        give(named, step)
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_200_fp32_steps_equal_torch_s_adamw(weight_decay: float) -> None:
    ours, theirs = parameters(), parameters()
    numbers: dict[str, Any] = {
        "lr": 3e-3,
        "betas": (0.9, 0.99),
        "eps": 1e-6,
        "weight_decay": weight_decay,
    }

    run(optimizer_of(ours, **numbers), ours, range(200))
    run(torch.optim.AdamW(theirs.values(), foreach=False, **numbers), theirs, range(200))

    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_moment_follows_the_gradient_down_again(dtype: torch.dtype) -> None:
    weight = Parameter(torch.ones(1, dtype=dtype))
    optimizer = optimizer_of({"w": weight})
    seen = []
    for gradient, steps in ((1.0, 2001), (1e-3, 5000)):
        weight.grad = torch.full_like(weight, gradient)
        for _ in range(steps):
            optimizer.step()
        seen.append(float(optimizer.state[weight]["exp_avg_sq"]))

    loud = 1 - 0.999**2001
    quiet = loud * 0.999**5000 + 1e-6 * (1 - 0.999**5000)
    assert seen == pytest.approx([loud, quiet], rel=1e-3)
    assert seen == pytest.approx([0.865, 0.0058], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_fp32_whatever_the_weights_are(dtype: torch.dtype) -> None:
    named = parameters(dtype)
    optimizer = optimizer_of(named)

    run(optimizer, named, range(2))

    for parameter in named.values():
        state = optimizer.state[parameter]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
        assert state["step"] == 2
        assert parameter.dtype == dtype


def test_weight_decay_alone_shrinks_by_one_minus_rate_times_decay() -> None:
    weight = Parameter(torch.ones(4))
    optimizer = optimizer_of({"w": weight}, lr=1e-2, weight_decay=0.1)

    for _ in range(100):
        weight.grad = torch.zeros(4)
        optimizer.step()

    torch.testing.assert_close(weight, torch.full((4,), (1 - 1e-3) ** 100), rtol=1e-5, atol=0)


def test_bf16_weights_take_steps_far_below_their_resolution() -> None:
    # Adam under a constant gradient moves by lr each step; near 1 a bf16 resolves 2^-8 at best
    weight = Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = optimizer_of({"w": weight}, lr=1e-4, weight_decay=0.0, eps=1e-12)

    for _ in range(500):
        weight.grad = torch.ones_like(weight)
        optimizer.step()

    assert float(weight.detach().float().mean()) == pytest.approx(1 - 0.05, abs=5e-4)


@pytest.mark.slow
def test_bf16_rounding_has_no_bias_over_10000_steps() -> None:
    # a rate that fp32 subtracts exactly; independent roundings leave a spread of 4e-4 in the mean
    rate = 2.0**-16
    weight = Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = optimizer_of({"w": weight}, lr=rate, weight_decay=0.0, eps=1e-12)
    weight.grad = torch.full_like(weight, 0.5)

    for _ in range(10_000):
        optimizer.step()

    mean = float(weight.detach().float().mean())
    assert abs(mean / (1 - 10_000 * rate) - 1) < 1e-3


@pytest.mark.parametrize("value", [1.001, -1.001, 3e-5, -7.7e12, 0.0])
def test_rounding_goes_to_a_neighbour_and_keeps_the_mean(value: float) -> None:
    exact = torch.full((200_000,), value)

    rounded = round_stochastically(exact, key=5)

    below = float((torch.tensor(value).view(torch.int32) & -(1 << 16)).view(torch.float32))
    step = abs(value) * 2.0**-7
    assert rounded.dtype == torch.bfloat16
    assert len(rounded.unique()) == (2 if value else 1)
    assert float((rounded.float() - below).abs().max()) <= step
    assert float(rounded.double().mean()) == pytest.approx(value, abs=step * 0.005)


def test_rounding_keeps_what_a_bf16_can_hold_and_what_is_not_finite() -> None:
    values = torch.tensor([1.0, -2.5, 0.0, float("inf"), float("-inf"), float("nan")])
    values = torch.cat([values, torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)])

    for key in range(20):
        rounded = round_stochastically(values, key).float()

        assert torch.equal(rounded[:5], values[:5])
        assert rounded[5:].isnan().all()


def bf16_run(named: dict[str, Parameter], seed: int = 1) -> dict[str, Tensor]:
    run(optimizer_of(named, seed=seed), named, range(5))
    return {name: parameter.detach().clone() for name, parameter in named.items()}


def test_bf16_steps_are_the_same_each_time_and_leave_the_global_generator_alone() -> None:
    first = bf16_run(parameters(torch.bfloat16))
    torch.manual_seed(123)
    before = torch.get_rng_state()

    again = bf16_run(parameters(torch.bfloat16))

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(before, torch.get_rng_state())


def test_the_rounding_changes_with_the_seed() -> None:
    first = bf16_run(parameters(torch.bfloat16), seed=1)
    other = bf16_run(parameters(torch.bfloat16), seed=2)

    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_one_more_parameter_does_not_shift_the_rounding_of_the_others() -> None:
    alone = bf16_run(parameters(torch.bfloat16))
    joined = parameters(torch.bfloat16)
    joined["0-first-by-name"] = Parameter(torch.ones(5, dtype=torch.bfloat16))

    together = bf16_run(joined)

    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_one_more_parameter_at_the_front_does_not_either() -> None:
    alone = bf16_run(parameters(torch.bfloat16))
    group = {"0": Parameter(torch.zeros(5, dtype=torch.bfloat16)), **parameters(torch.bfloat16)}
    optimizer = optimizer_of(group, seed=1)
    for step in range(5):
        give({name: group[name] for name in alone}, step)
        group["0"].grad = torch.ones_like(group["0"])
        optimizer.step()

    assert all(torch.equal(alone[name], group[name]) for name in alone)


def test_parameters_and_steps_do_not_share_their_rounding() -> None:
    start = torch.full((64,), 1.001)
    named = {name: Parameter(torch.ones(64, dtype=torch.bfloat16)) for name in "ab"}
    optimizer = optimizer_of(named, lr=1e-3, weight_decay=0.0)
    moves = []

    for _ in range(3):
        for parameter in named.values():
            parameter.data.copy_(start)
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moves += [tuple(parameter.tolist()) for parameter in named.values()]

    assert len(set(moves)) == len(moves)


def test_updating_in_portions_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = parameters(torch.bfloat16), parameters(torch.bfloat16)
    expected = bf16_run(whole)

    monkeypatch.setattr("simpletuner.optim.adamw_bf16._MOST_NUMBERS", 40)

    assert all(torch.equal(expected[n], found) for n, found in bf16_run(cut).items())


def test_a_parameter_without_gradient_stays_and_starts_counting_later() -> None:
    named = parameters()
    optimizer = optimizer_of(named)
    before = named["a"].detach().clone()
    give(named, 0)
    named["a"].grad = None

    optimizer.step()
    assert torch.equal(named["a"], before)
    run(optimizer, named, [1])

    assert [optimizer.state[p]["step"] for p in named.values()] == [1, 2, 2]


def test_fp16_weights_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="trains fp32 and bf16 weights; w is float16"):
        optimizer_of({"w": Parameter(torch.ones(2, dtype=torch.float16))})
