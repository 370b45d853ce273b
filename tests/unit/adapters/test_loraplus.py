"""LoRA+: B learns faster than A, as peft's own optimizer for it has it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor

from simpletuner.adapters.lora import LoRA
from simpletuner.training.stepper import Stepper
from tests.unit.config.workplace import Workplace
from tests.unit.training.builds import build_stepper, make_batch, window_of

RATE, RATIO = 1e-3, 16.0
ADAPTER = {"peft_lora_target_modules": ["to_q"], "loraplus_lr_ratio": RATIO}


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    found = Workplace(tmp_path)
    found.datasets()
    return found


def begun(model: Path, adapter: dict[str, Any], optimizer: str) -> Stepper:
    """A stepper whose B is no longer zero, so that A has a gradient."""
    stepper = build_stepper(model, adapter=adapter, learning_rate=RATE, optimizer=optimizer)
    torch.manual_seed(3)
    for name, parameter in stepper.weights.trainable.parameters().items():
        if name.endswith("lora_B.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    return stepper


def moved(stepper: Stepper) -> dict[str, Tensor]:
    """How far one step takes each weight."""
    parameters = stepper.weights.trainable.parameters()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    stepper.step(0, window_of(make_batch(1, 2)))
    return {name: (p - before[name]).detach() for name, p in parameters.items()}


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"train_text_encoder": True}])
def test_b_goes_the_ratio_times_as_far_in_a_plain_step_and_all_else_as_far(
    tiny_sdxl: Path, more: dict[str, Any]
) -> None:
    plain = {"peft_lora_target_modules": ["to_q"], **more}
    near, far = (
        moved(begun(tiny_sdxl, {**plain, **extra}, "torch-sgd")) for extra in ({}, ADAPTER)
    )
    assert near.keys() == far.keys()
    for name, way in near.items():
        assert way.abs().max() > 0, name
        times = RATIO if name.endswith("lora_B.weight") else 1.0
        # what a weight has moved is known to a digit of the weight itself
        torch.testing.assert_close(far[name], times * way, rtol=1e-3, atol=times * 1e-7)


def test_a_step_of_adamw_is_that_of_pefts_own_optimizer(tiny_sdxl: Path) -> None:
    stepper = begun(tiny_sdxl, ADAPTER, "torch-adamw")
    lora = stepper.weights.trainable
    assert isinstance(lora, LoRA)
    reference: Any = copy.deepcopy(lora.denoiser)
    theirs = create_loraplus_optimizer(
        reference,
        torch.optim.AdamW,
        lr=RATE,
        loraplus_lr_ratio=RATIO,
        loraplus_weight_decay=0.01,
        eps=1e-8,
    )
    for group in theirs.param_groups:
        group["weight_decay"] = 0.01
    stepper.step(0, window_of(make_batch(1, 2)))
    ours = dict(lora.denoiser.named_parameters())
    for name, parameter in reference.named_parameters():
        grad = ours[name].grad
        parameter.grad = None if grad is None else grad.clone()
    theirs.step()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(ours[name], parameter, rtol=0, atol=1e-8)


def test_the_ratio_is_told_and_holds_along_a_schedule(tiny_sdxl: Path) -> None:
    stepper = begun(tiny_sdxl, ADAPTER, "torch-sgd")
    assert stepper.weights.trainable.summary.endswith("alpha 6, B at 16 times the rate")
    stepper.step(0, window_of(make_batch(1, 2)))
    rates = {g["name"]: g["lr"] for g in stepper.weights.optimizer.param_groups}
    assert rates == {"lora": pytest.approx(RATE), "lora, B": pytest.approx(RATE * RATIO)}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "full"}, "is of an adapter, and model_type full has none"),
        (
            {"lora_type": "lycoris", "lycoris_config": {"algo": "lokr"}},
            "is of a plain LoRA; remove it, or set lora_type standard",
        ),
        (
            {"optimizer": "prodigy", "learning_rate": 1},
            "prodigy finds one rate for all that trains; remove it, or take another",
        ),
        ({"loraplus_lr_ratio": 0}, "must be more than 0, got 0"),
    ],
)
def test_it_is_refused_where_it_has_no_meaning(
    place: Workplace, settings: dict[str, Any], said: str
) -> None:
    place.config(**{"loraplus_lr_ratio": 16, **settings})
    (problem,) = [p for p in place.problems() if p.key == "loraplus_lr_ratio"]
    assert said in problem.message
