"""gradient_precision: gradients of bf16 weights are summed in fp32, from end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter

from simpletuner.apps.cli import main
from simpletuner.core.seeds import Seeds
from simpletuner.core.types import ParamGroup, Place
from simpletuner.optim.build import build_optimizer
from simpletuner.optim.optimizers import OPTIMIZERS
from simpletuner.optim.settings import OptimizerSettings
from tests.runs import Run
from tests.unit.training.builds import build_stepper, gradients_of, make_batch, window_of

FULL = {"model_type": "full", "mixed_precision": "bf16", "learning_rate": 1e-4}


def summed(precision: str | None) -> Tensor:
    """The gradient of a bf16 weight over a large micro-batch and 256 small ones."""
    weight = Parameter(torch.zeros(1, dtype=torch.bfloat16))
    settings = OptimizerSettings(gradient_precision=precision)
    build_optimizer(settings, [ParamGroup("all", {"weight": weight})], Seeds(0))
    for share in (1.0, *([1 / 512] * 256)):
        (weight * share).sum().backward()
    assert weight.grad is not None
    return weight.grad


def test_small_gradients_count_beside_a_large_one() -> None:
    for unmodified in (None, "unmodified"):
        assert summed(unmodified).dtype == torch.bfloat16
        assert summed(unmodified) == 1  # half of bf16's step at 1 is 1/256: each is lost
    assert summed("fp32").dtype == torch.float32
    assert summed("fp32") == 1.5


def test_a_window_s_gradient_is_nearer_to_the_sum_of_its_parts(tiny_sdxl: Path) -> None:
    window = window_of(*(make_batch(n) for n in range(1, 17)))

    def found(precision: str | None, parts: bool = False) -> list[dict[str, Tensor]]:
        stepper = build_stepper(
            tiny_sdxl,
            Place(torch.device("cpu"), torch.bfloat16),
            torch.bfloat16,
            adapter={"model_type": "full", "lora_rank": 16, "lora_alpha": None},
            gradient_precision=precision,
        )
        if not parts:
            return [gradients_of(stepper, window)]
        each = []
        for micro, pair in enumerate(window):
            for parameter in stepper.weights.trainable.parameters().values():
                parameter.grad = None
            stepper.micro_loss(0, micro, *pair).backward()
            held = stepper.weights.trainable.parameters()
            each.append({n: p.grad.double() for n, p in held.items() if p.grad is not None})
        return each

    several = found(None, parts=True)
    exact = {name: sum(part[name] for part in several) for name in several[0]}

    def error(gradients: dict[str, Tensor]) -> float:
        off = sum((gradients[n].double() - e).square().sum() for n, e in exact.items())
        return float(torch.as_tensor(off / sum(e.square().sum() for e in exact.values())).sqrt())

    (rough,), (fine,) = found(None), found("fp32")
    assert {g.dtype for g in fine.values()} == {torch.float32}
    assert error(fine) < 2e-9  # measured: 8e-10
    assert error(rough) > 2e-3  # measured: 4e-3


def test_a_full_run_in_bf16_resumes_to_the_bit_and_learns_otherwise(
    tmp_path: Path, tiny_sdxl: Path
) -> None:
    run = Run(tmp_path, tiny_sdxl)
    del run.settings["lora_rank"]
    run.settings |= {**FULL, "validation_disable": True, "gradient_accumulation_steps": 2}
    ends = []
    for precision in ("fp32", "unmodified"):
        run.settings["gradient_precision"] = precision
        run.settings["output_dir"] = str(tmp_path / precision)
        assert run.train() == 0
        last = run.out / "checkpoint-4"
        straight = load_file(last / "trainable.safetensors")
        shutil.rmtree(last)
        assert run.train() == 0
        resumed = load_file(last / "trainable.safetensors")
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)
        assert {t.dtype for t in straight.values()} == {torch.bfloat16}
        ends.append(straight)
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("name", [n for n, r in OPTIMIZERS.items() if r.fact("bf16_weights")])
def test_an_optimizer_takes_them_or_is_refused_by_name(
    name: str, tmp_path: Path, tiny_sdxl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, tiny_sdxl)
    del run.settings["lora_rank"]
    run.settings |= {**FULL, "validation_disable": True, "max_train_steps": 1}
    code = run.train(optimizer=name, gradient_precision="fp32")
    if OPTIMIZERS[name].fact("fp32_gradients"):
        assert code == 0
        return
    assert code == 2
    assert (
        f"{name} takes gradients in the dtype of the weights, here bf16; take adamw_bf16, or"
        " remove this"
    ) in capsys.readouterr().err
    held = {"base_model_default_dtype": "fp32"}
    assert run.train(optimizer=name, gradient_precision="fp32", **held) == 0


def test_the_estimate_counts_them(
    tmp_path: Path, tiny_sdxl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, tiny_sdxl)
    del run.settings["lora_rank"]
    sizes = []
    for precision in ("unmodified", "fp32"):
        config = run.write(**FULL, gradient_precision=precision)
        assert main(["estimate", "--config", str(config), "--json"]) == 0
        sizes.append(json.loads(capsys.readouterr().out)["gradients"])
    assert sizes[1] == 2 * sizes[0]
