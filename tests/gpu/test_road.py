"""Whole runs on a CUDA device, against the same runs on the CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.core.errors import is_out_of_memory
from tests.runs import Run

pytestmark = pytest.mark.gpu

FAMILIES = ("sdxl", "sd3")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, Path]:
    return request.param, request.getfixturevalue(f"tiny_{request.param}")


def run_of(root: Path, family: tuple[str, Path], **settings: object) -> Run:
    name, model = family
    run = Run(root, model)
    # exact products, as on the CPU
    run.settings |= {"model_family": name, "lora_dropout": 0.0, "disable_tf32": True, **settings}
    return run


def weights(run: Run) -> Mapping[str, torch.Tensor]:
    return load_file(run.out / "pytorch_lora_weights.safetensors")


def moved(run: Run) -> float:
    return float(sum(tensor.abs().sum() for tensor in weights(run).values()))


def test_a_run_is_the_run_on_the_cpu_but_for_rounding(
    family: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws come from the CPU, so noise, timesteps, captions and order are the same ones."""
    there = run_of(tmp_path / "cuda", family)
    assert there.train(max_train_steps=6) == 0
    state = json.loads((there.out / "checkpoint-6" / "state.json").read_text())
    assert state["device"] == "cuda"

    # A process has one device; accelerate remembers it.
    from accelerate.state import AcceleratorState, PartialState

    PartialState._reset_state()
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    here = run_of(tmp_path / "cpu", family)
    try:
        assert here.train(max_train_steps=6) == 0
    finally:
        PartialState._reset_state()

    assert there.losses() == pytest.approx(here.losses(), rel=5e-3)
    assert set(weights(there)) == set(weights(here))


def test_bf16_follows_fp32(family: tuple[str, Path], tmp_path: Path) -> None:
    whole, half = (
        run_of(tmp_path / precision, family, mixed_precision=precision)
        for precision in ("no", "bf16")
    )
    assert whole.train(max_train_steps=6) == half.train(max_train_steps=6) == 0
    assert half.losses() == pytest.approx(whole.losses(), rel=0.05)
    assert moved(half) == pytest.approx(moved(whole), rel=0.2)


def test_a_resumed_run_goes_on_where_it_was(family: tuple[str, Path], tmp_path: Path) -> None:
    unbroken, broken = run_of(tmp_path / "one", family), run_of(tmp_path / "two", family)
    assert unbroken.train(max_train_steps=8) == 0
    assert broken.train(max_train_steps=8, checkpoint_step_interval=4) == 0
    for path in ("checkpoint-8", "pytorch_lora_weights.safetensors"):
        (broken.out / path).rename(tmp_path / path)
    (broken.out / "checkpoint-6").exists() and (broken.out / "checkpoint-6").rename(tmp_path / "6")
    assert broken.train(max_train_steps=8, checkpoint_step_interval=4) == 0

    assert broken.losses()[-4:] == pytest.approx(unbroken.losses()[-4:], rel=1e-4)
    for name, tensor in weights(unbroken).items():
        assert torch.allclose(tensor, weights(broken)[name], atol=1e-5, rtol=1e-3), name


def test_checkpointed_activations_change_nothing(family: tuple[str, Path], tmp_path: Path) -> None:
    plain = run_of(tmp_path / "plain", family)
    saving = run_of(tmp_path / "saving", family, gradient_checkpointing=True)
    assert plain.train() == saving.train() == 0
    assert saving.losses() == pytest.approx(plain.losses(), rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing_backend": "unsloth"},
        {"musubi_blocks_to_swap": 1},
        {"enable_group_offload": True},
        {"enable_group_offload": True, "group_offload_type": "leaf_level", "use_dora": True},
    ],
)
def test_what_waits_in_the_computers_memory_changes_nothing(
    family: tuple[str, Path], tmp_path: Path, settings: dict[str, object]
) -> None:
    shared = {"use_dora": settings.get("use_dora", False), "gradient_checkpointing": True}
    plain = run_of(tmp_path / "plain", family, **shared)
    waiting = run_of(tmp_path / "waiting", family, **shared)
    assert plain.train() == waiting.train(**settings) == 0
    assert waiting.losses() == pytest.approx(plain.losses(), rel=1e-3)


def test_a_full_memory_of_the_device_is_told_from_other_faults() -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        torch.empty(1 << 46, dtype=torch.uint8, device="cuda")
    assert is_out_of_memory(caught.value)
