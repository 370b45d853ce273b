"""Full fine-tuning: the whole denoiser trains, resumes bit for bit, loads in the stock pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from tests.runs import Run

Captured = pytest.CaptureFixture[str]


def full(root: Path, model: Path, **settings: Any) -> Run:
    run = Run(root, model)
    run.settings |= {"model_type": "full", "learning_rate": 1e-4, "validation_disable": True}
    run.settings |= settings
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    ("family", "part", "cls"),
    [("sdxl", "unet", "UNet2DConditionModel"), ("sd3", "transformer", "SD3Transformer2DModel")],
)
def test_the_result_is_a_part_of_the_stock_pipeline_and_every_weight_moved(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: Captured,
    family: str,
    part: str,
    cls: str,
) -> None:
    model: Path = request.getfixturevalue(f"tiny_{family}")
    run = full(tmp_path, model, model_family=family, validation_disable=False)
    run.settings["disable_benchmark"] = False
    assert run.train() == 0
    said = capsys.readouterr().out
    assert f"method: full, the whole {part}," in said
    assert f'{part} = {cls}.from_pretrained("{run.out / part}"' in said
    stock = getattr(diffusers, cls).from_pretrained(run.out / part)
    base = dict(getattr(diffusers, cls).from_pretrained(model / part).named_parameters())
    moved = [n for n, p in stock.named_parameters() if not torch.equal(p, base[n])]
    assert len(base) - len(moved) == {"unet": 0, "transformer": 3}[part]  # what nothing reads
    assert run.events()[-1]["verified"].startswith("verified: ")
    assert (run.out / "before_after.png").is_file()
    name = cls.removesuffix("Model").lower()
    pipe = diffusers.DiffusionPipeline.from_pretrained(model, **{part: stock})
    assert name in type(getattr(pipe, part)).__name__.lower()
    assert same(weights(run.out / part), weights(run.out / "checkpoint-4" / part))
    header = json.loads((run.out / "run.json").read_text())
    assert header["result"]["weights"] == part


@pytest.mark.parametrize("more", [{}, {"use_ema": True}, {"mixed_precision": "bf16"}])
def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, tiny_sdxl: Path, more: dict[str, Any]
) -> None:
    more = {"lr_scheduler": "constant", **more}
    straight, broken = (full(tmp_path / name, tiny_sdxl, **more) for name in ("one", "two"))
    assert straight.train() == 0
    assert broken.train(max_train_steps=2) == 0
    assert broken.train() == 0
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        one, other = (load_file(run.out / "checkpoint-4" / name) for run in (straight, broken))
        assert same(one, other)
    assert same(weights(straight.out / "unet"), weights(broken.out / "unet"))
    held = {tensor.dtype for tensor in weights(straight.out / "unet").values()}
    assert held == {torch.bfloat16 if "mixed_precision" in more else torch.float32}


def test_bitfit_moves_every_bias_and_nothing_else(tmp_path: Path, tiny_sdxl: Path) -> None:
    run = full(tmp_path, tiny_sdxl, layer_freeze_strategy="bitfit", learning_rate=1e-3)
    assert run.train() == 0
    before, after = weights(tiny_sdxl / "unet"), weights(run.out / "unet")
    assert before.keys() == after.keys()
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert moved == {name for name in before if name.endswith(".bias")}
    held = load_file(run.out / "checkpoint-4/trainable.safetensors")
    assert held.keys() == moved
    state = load_file(run.out / "checkpoint-4/optimizer.safetensors")
    assert sum(t.numel() for t in state.values() if t.ndim) == 2 * sum(
        t.numel() for t in held.values()
    )


def test_weights_stay_in_fp32_beside_an_optimizer_that_is_not_made_for_bf16(
    tmp_path: Path, tiny_sdxl: Path
) -> None:
    run = full(tmp_path, tiny_sdxl, mixed_precision="bf16", optimizer="torch-adamw")
    assert run.train(max_train_steps=2) == 0
    assert {t.dtype for t in weights(run.out / "unet").values()} == {torch.float32}


def test_an_average_is_what_is_written_and_not_what_trains(tmp_path: Path, tiny_sdxl: Path) -> None:
    run = full(tmp_path, tiny_sdxl, use_ema=True)
    assert run.train() == 0
    raw = load_file(run.out / "checkpoint-4/trainable.safetensors")
    shadow = load_file(run.out / "checkpoint-4/ema.safetensors")
    written = weights(run.out / "unet")
    assert same(written, shadow)
    assert not same(written, raw)


def test_a_checkpoint_with_a_damaged_folder_is_passed_over(
    tmp_path: Path, tiny_sdxl: Path, capsys: Captured
) -> None:
    run = full(tmp_path, tiny_sdxl)
    assert run.train() == 0
    file = run.out / "checkpoint-4/unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert run.train(max_train_steps=4) == 0
    said = capsys.readouterr().out
    assert "checkpoint-4/unet/diffusion_pytorch_model.safetensors is damaged" in said
    assert "resumed: checkpoint-2, 2 steps done" in said


@pytest.mark.parametrize(
    ("settings", "dataset", "said"),
    [
        ({"use_dora": True}, {}, "use_dora"),
        ({"init_lora": "x.safetensors"}, {}, "init_lora"),
        ({"base_model_precision": "int8-quanto"}, {}, "model_type full trains them all"),
        ({}, {"is_regularisation_data": True}, "which model_type full does not keep"),
    ],
)
def test_what_is_of_adapters_alone_is_refused(
    tmp_path: Path,
    tiny_sdxl: Path,
    capsys: Captured,
    settings: dict[str, Any],
    dataset: dict[str, Any],
    said: str,
) -> None:
    run = full(tmp_path, tiny_sdxl, **settings)
    run.dataset |= dataset
    assert run.train() == 2
    assert said in capsys.readouterr().err
