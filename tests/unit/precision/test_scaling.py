"""fp16 with a scaled loss: gradients that would vanish are there, and a step that overflows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from simpletuner.core.errors import TrainingError
from simpletuner.core.types import Place
from simpletuner.optim.optimizers import OPTIMIZERS
from simpletuner.precision.quantisers import QUANTISERS, quantised_in
from simpletuner.precision.scaling import Scaler
from simpletuner.training.stepper import Stepper
from tests.unit.training.builds import build_stepper, gradients_of, make_batch, window_of

CPU = torch.device("cpu")
HALF = Place(CPU, torch.float16)


def in_fp16(folder: Path, family: str, first: float = 2.0**16, **settings: object) -> Stepper:
    chosen = {"learning_rate": 1e-2, **settings}
    stepper = build_stepper(folder, HALF, torch.float16, family_name=family, **chosen)
    scaler = Scaler(CPU, first)
    return replace(stepper, weights=replace(stepper.weights, scaler=scaler))


def test_only_fp16_needs_it() -> None:
    assert Scaler.of(torch.float32, CPU) is None
    assert Scaler.of(torch.bfloat16, CPU) is None
    scaler = Scaler.of(torch.float16, CPU)
    assert scaler is not None
    assert scaler.factor == 65536


def test_gradients_that_fp16_loses_are_there(tiny_flux: Path) -> None:
    """Against fp32: without scaling a whole tensor's gradient is zero."""
    window = window_of(make_batch(1, 2, family_name="flux"))
    exact = gradients_of(build_stepper(tiny_flux, family_name="flux"), window)
    scaled = in_fp16(tiny_flux, "flux", max_grad_norm=0)
    plain = replace(scaled, weights=replace(scaled.weights, scaler=None))
    lost = gradients_of(plain, window)
    scaled.step(0, window)
    kept = {n: p.grad for n, p in scaled.weights.trainable.parameters().items()}

    def error(found: dict[str, torch.Tensor]) -> float:
        kinds = [name for name, gradient in exact.items() if gradient.any()]
        return max(float((found[n] - exact[n]).norm() / exact[n].norm()) for n in kinds)

    assert error(kept) < 0.05  # measured: 0.026
    assert error(lost) == 1  # all of it


@pytest.mark.parametrize("family", ["flux", "sd1x", "sd3", "sdxl"])
def test_training_is_that_of_fp32(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    window = window_of(make_batch(1, 2, family_name=family))
    half = in_fp16(folder, family)
    exact = build_stepper(folder, family_name=family, learning_rate=1e-2)
    for _ in range(6):
        ours, theirs = half.step(0, window), exact.step(0, window)
        assert not ours.skipped
        # measured: 4e-4 at most, FLUX's
        assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-3)
    parameters = half.weights.trainable.parameters().values()
    assert {p.dtype for p in parameters} == {torch.float32}


def test_a_step_that_overflows_moves_nothing_and_the_next_is_scaled_by_half(
    tiny_sdxl: Path,
) -> None:
    stepper, window = in_fp16(tiny_sdxl, "sdxl", first=2.0**40), window_of(make_batch(1, 2))
    before = {n: p.clone() for n, p in stepper.weights.trainable.parameters().items()}

    outcome = stepper.step(0, window)

    assert outcome.skipped
    assert outcome.loss.isfinite()
    for name, parameter in stepper.weights.trainable.parameters().items():
        assert torch.equal(parameter, before[name])
    assert not stepper.weights.optimizer.state
    scaler = stepper.weights.scaler
    assert isinstance(scaler, Scaler)
    assert scaler.factor == 2.0**39
    while stepper.step(0, window).skipped:
        pass
    assert scaler.factor > 2.0**16


def test_gradients_that_no_factor_makes_finite_end_the_run(tiny_sdxl: Path) -> None:
    stepper, window = in_fp16(tiny_sdxl, "sdxl", first=2.0), window_of(make_batch(1, 2))
    weight = next(iter(stepper.weights.trainable.parameters().values()))
    weight.register_hook(lambda gradient: gradient / 0)
    assert stepper.step(0, window).skipped
    with pytest.raises(TrainingError, match=r"overflow the range of fp16 in every step") as error:
        stepper.step(1, window)
    assert "set mixed_precision to bf16" in str(error.value)


def test_what_it_remembers_comes_back() -> None:
    one, other = Scaler(CPU, 2.0**20), Scaler(CPU)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for factor in (float("inf"), 1.0, 1.0):
        optimizer.zero_grad()
        one.scaled((weight * factor).sum()).backward()
        one.unscale(optimizer)
        one.step(optimizer)
    other.load(one.tensors())
    assert other.factor == one.factor == 2.0**19
    assert other.tensors() == one.tensors()
    assert other.tensors()["steps since"] == 2


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if not row.pending])
def test_every_optimizer_steps_over_scaled_gradients_as_over_plain_ones(
    name: str, tiny_sdxl: Path
) -> None:
    rate = 1.0 if OPTIMIZERS[name].fact("own_rate") else 1e-3
    window, settings = window_of(make_batch(1, 2)), {"optimizer": name, "learning_rate": rate}
    ends = []
    for first in (1.0, 2.0**10, 2.0**40):
        stepper = in_fp16(tiny_sdxl, "sdxl", first=first, **settings)
        taken = 0
        while taken < 3:
            taken += not stepper.step(0, window).skipped
        ends.append(stepper.step(0, window).loss.item())
    assert ends == pytest.approx([ends[0]] * 3, rel=1.5e-4)  # measured: 6e-5 at most, Adam's


@pytest.mark.parametrize("name", [n for n in QUANTISERS if not quantised_in(n, "cpu", "fp16")])
def test_it_learns_over_every_format_that_computes_in_it(name: str, tiny_sdxl: Path) -> None:
    stepper, window = in_fp16(tiny_sdxl, "sdxl", base_format=name), window_of(make_batch(1, 2))
    losses = [stepper.step(0, window).loss.item() for _ in range(6)]
    assert losses[-1] < losses[0] - 0.01
