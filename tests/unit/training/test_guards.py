"""The guards speak when something does not learn or is not finite, and name it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simpletuner.core.errors import TrainingError
from simpletuner.precision.fit import fit
from simpletuner.precision.settings import PrecisionSettings
from simpletuner.training.guards import LearningGuard, explain_not_finite
from simpletuner.training.stepper import Stepper
from tests.unit.training.builds import build_stepper, make_batch, window_of


def train_watched(stepper: Stepper, steps: int = 3) -> None:
    guard = LearningGuard(stepper.weights)
    for step in range(steps):
        guard.watch(stepper.step(step, window_of(make_batch(1, 2))).loss)


def test_a_healthy_run_passes(tiny_sdxl: Path) -> None:
    train_watched(build_stepper(tiny_sdxl), 5)


def test_a_tensor_without_a_gradient_is_named(tiny_sdxl: Path) -> None:
    stepper = build_stepper(tiny_sdxl)
    layer = next(iter(stepper.weights.trainable.layers().items()))
    layer[1].lora_B["default"].weight.register_hook(torch.zeros_like)
    with pytest.raises(TrainingError, match="2 of 128 trainable tensors got no gradient") as error:
        train_watched(stepper)
    assert layer[0] in error.value.message


def test_weights_that_do_not_move_are_seen(tiny_sdxl: Path) -> None:
    stepper = build_stepper(tiny_sdxl)
    guard = LearningGuard(stepper.weights)
    start = {n: p.detach().clone() for n, p in stepper.weights.trainable.parameters().items()}
    for step in range(2):
        guard.watch(stepper.step(step, window_of(make_batch(1, 2))).loss)
    last = stepper.step(2, window_of(make_batch(1, 2)))
    with torch.no_grad():
        for name, parameter in stepper.weights.trainable.parameters().items():
            parameter.copy_(start[name])
    with pytest.raises(TrainingError, match="did not move"):
        guard.watch(last.loss)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
@pytest.mark.parametrize("rate", [1e-3, 1e-7])
def test_a_new_controlnet_learns_though_two_of_its_layers_begin_at_zero(
    request: pytest.FixtureRequest, family: str, rate: float
) -> None:
    stepper = build_stepper(
        request.getfixturevalue(f"tiny_{family}"),
        adapter={"model_type": "full", "controlnet": True},
        family_name=family,
        learning_rate=rate,
    )
    guard = LearningGuard(stepper.weights)
    for step in range(3):
        batch = make_batch(1, 2, family_name=family, controlled=True)
        guard.watch(stepper.step(step, window_of(batch)).loss)


def test_steps_without_anything_to_teach_are_waited_out(tiny_sdxl: Path) -> None:
    stepper = build_stepper(tiny_sdxl)
    guard = LearningGuard(stepper.weights)
    kept = make_batch(1, 2, regularises=True)
    for step, batch in enumerate((kept, kept, kept, make_batch(3), kept, make_batch(4))):
        guard.watch(stepper.step(step, window_of(batch)).loss)


def test_a_loss_that_is_not_finite_names_step_samples_and_module(tiny_sdxl: Path) -> None:
    stepper = build_stepper(tiny_sdxl)
    denoiser = stepper.weights.trainable.denoiser
    with torch.no_grad():
        denoiser.mid_block.resnets[0].conv1.weight.fill_(float("nan"))
    window = window_of(make_batch(1), make_batch(2))
    outcome = stepper.step(6, window)
    assert not torch.isfinite(outcome.loss)
    error = explain_not_finite(stepper, 6, window)
    assert "the loss of step 7 is not finite" in error.message
    assert "set/1.png, set/2.png" in error.message
    assert "mid_block.resnets.0.conv1" in error.message


def test_inside_a_compiled_block_the_module_is_named_as_well(tiny_sd3: Path) -> None:
    stepper = build_stepper(tiny_sd3, family_name="sd3")
    trainable = stepper.weights.trainable
    fit(trainable.modules, PrecisionSettings(dynamo_backend="aot_eager"), torch.device("cpu"))
    window = window_of(make_batch(1, family_name="sd3"))
    assert torch.isfinite(stepper.step(0, window).loss)
    with trainable.disabled(), torch.no_grad():  # compiled in this way by the base's pictures
        stepper.micro_loss(0, 0, *window[0])
    name = "transformer_blocks.0.ff.net.2"
    with torch.no_grad():
        trainable.denoiser.get_submodule(name).weight.fill_(float("nan"))
    assert not torch.isfinite(stepper.step(1, window).loss)
    assert f"first in module {name}" in explain_not_finite(stepper, 1, window).message


def test_a_batch_of_regularisation_is_replayed_without_the_adapters_too(tiny_sdxl: Path) -> None:
    stepper = build_stepper(tiny_sdxl)
    with torch.no_grad():
        next(iter(stepper.weights.trainable.parameters().values())).fill_(float("nan"))
    error = explain_not_finite(stepper, 0, window_of(make_batch(1, regularises=True)))
    assert "what was trained has diverged" in error.message


def test_only_the_sample_that_breaks_is_blamed(tiny_sdxl: Path) -> None:
    stepper = build_stepper(tiny_sdxl)
    bad = make_batch(2)
    bad.latents.fill_(float("inf"))
    error = explain_not_finite(stepper, 0, window_of(make_batch(1), bad))
    assert "set/2.png" in error.message
    assert "set/1.png" not in error.message


def test_adapters_that_diverged_are_told_from_bad_data(tiny_sdxl: Path) -> None:
    stepper = build_stepper(tiny_sdxl)
    with torch.no_grad():
        next(iter(stepper.weights.trainable.parameters().values())).fill_(float("nan"))
    error = explain_not_finite(stepper, 0, window_of(make_batch(1)))
    assert "what was trained has diverged" in error.message
    assert "lower learning_rate" in str(error)
