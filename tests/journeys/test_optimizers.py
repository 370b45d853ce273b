"""Runs with optimizers that are more than a rule for one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import Run

Captured = pytest.CaptureFixture[str]


def run_of(root: Path, model: Path, optimizer: str, **settings: Any) -> Run:
    run = Run(root, model)
    run.settings |= {"optimizer": optimizer, "lr_scheduler": "constant", "validation_disable": True}
    run.settings |= {"checkpoint_step_interval": 2, "max_train_steps": 6, **settings}
    return run


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("adamw_schedulefree", {}),
        ("prodigy", {"learning_rate": 1.0, "prodigy_steps": 3}),
        ("muon", {}),
        ("bnb-lion8bit", {}),
        ("soap", {"optimizer_config": {"precondition_frequency": 2}}),
        ("adamw_schedulefree", {"model_type": "full", "learning_rate": 1e-4}),
        ("muon", {"model_type": "full", "learning_rate": 1e-4}),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits_and_saving_shifts_nothing(
    tmp_path: Path, tiny_sdxl: Path, optimizer: str, settings: dict[str, Any]
) -> None:
    straight, broken, seldom = (
        run_of(tmp_path / name, tiny_sdxl, optimizer, **settings) for name in "abc"
    )
    assert straight.train() == 0
    assert broken.train(max_train_steps=4) == 0
    assert broken.train() == 0
    assert seldom.train(checkpoint_step_interval=0) == 0
    names = ("trainable", "optimizer")
    for name in names:
        one, other, third = (
            load_file(run.out / f"checkpoint-6/{name}.safetensors")
            for run in (straight, broken, seldom)
        )
        assert one.keys() == other.keys() == third.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert all(torch.equal(one[key], third[key]) for key in one)


def test_what_is_exported_is_the_average_of_a_schedule_free_run(
    tmp_path: Path, tiny_sdxl: Path
) -> None:
    run = run_of(tmp_path, tiny_sdxl, "adamw_schedulefree")
    assert run.train() == 0
    y = load_file(run.out / "checkpoint-6/trainable.safetensors")
    z = {
        key.removeprefix("z:"): value
        for key, value in load_file(run.out / "checkpoint-6/optimizer.safetensors").items()
        if key.startswith("z:")
    }
    written = load_file(run.out / "pytorch_lora_weights.safetensors")
    for key, value in y.items():
        x = (value - (1 - 0.9) * z[key]) / 0.9
        torch.testing.assert_close(written[f"unet.{key}"], x, atol=1e-7, rtol=1e-4)
        assert not torch.equal(written[f"unet.{key}"], value)


@pytest.mark.parametrize(
    ("optimizer", "settings", "said"),
    [
        ("adamw_schedulefree", {"lr_scheduler": "cosine"}, "takes its place; set constant"),
        ("adamw_schedulefree", {"use_ema": True}, "averages the weights itself"),
        ("prodigy", {}, "is a factor on the rate that prodigy finds; set it to 1"),
        ("adamw_bf16", {"prodigy_steps": 3}, "changes nothing without optimizer prodigy"),
        ("came", {"optimizer_beta1": 0.9, "optimizer_beta2": 0.99}, "has 3 betas"),
        ("torch-sgd", {"adam_epsilon": 1e-8}, "torch-sgd has no eps"),
    ],
)
def test_what_an_optimizer_decides_itself_is_not_asked_of_something_else(
    tmp_path: Path,
    tiny_sdxl: Path,
    capsys: Captured,
    optimizer: str,
    settings: dict[str, Any],
    said: str,
) -> None:
    assert run_of(tmp_path, tiny_sdxl, optimizer, **settings).train() == 2
    assert said in capsys.readouterr().err
