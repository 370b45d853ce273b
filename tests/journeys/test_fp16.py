"""Runs in fp16, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.core.files import sha256_file
from tests.runs import Run


def overflow_next(folder: Path) -> None:
    """Let the step after a checkpoint be scaled by far too much."""
    file, manifest = folder / "scaler.safetensors", folder / "manifest.json"
    tensors = load_file(file)
    save_file({**tensors, "factor": torch.tensor(2.0**45, dtype=torch.float64)}, file)
    facts = json.loads(manifest.read_text())
    facts["files"][file.name]["sha256"] = sha256_file(file)
    manifest.write_text(json.dumps(facts))


def halves(tmp_path: Path, model: Path, **settings: object) -> Run:
    run = Run(tmp_path, model)
    run.settings |= {"mixed_precision": "fp16", "lr_scheduler": "constant", **settings}
    return run


@pytest.mark.parametrize("method", [{}, {"model_type": "full", "use_ema": True}])
def test_four_steps_are_two_and_two_after_a_restart_with_one_that_overflows(
    tmp_path: Path, tiny_sdxl: Path, method: dict[str, object]
) -> None:
    run = halves(tmp_path, tiny_sdxl, validation_disable=True, **method)
    if method:
        del run.settings["lora_rank"]
    assert run.train(max_train_steps=2) == 0
    overflow_next(run.out / "checkpoint-2")
    again = tmp_path / "again"
    shutil.copytree(run.out, again)
    assert run.train(max_train_steps=6) == 0
    assert run.train(max_train_steps=4, output_dir=str(again)) == 0
    assert run.train(max_train_steps=6, output_dir=str(again)) == 0

    one, other = run.out / "checkpoint-6", again / "checkpoint-6"
    for file in ("trainable", "optimizer", "scaler", *(["ema"] if method else [])):
        straight, resumed = (load_file(each / f"{file}.safetensors") for each in (one, other))
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    dtypes = {t.dtype for t in load_file(one / "trainable.safetensors").values()}
    assert dtypes == {torch.float32}
    skipped = [event for event in run.events("step") if event["grad_norm"] is None]
    assert skipped[0]["step"] == 3
    assert json.loads((one / "state.json").read_text())["skipped"] == len(skipped)
    assert json.loads((other / "state.json").read_text())["skipped"] == len(skipped)
    assert json.loads((run.out / "run.json").read_text())["result"]["skipped_steps"] == len(skipped)
    assert "step 3 moved no weight: its gradients overflowed fp16" in run.notices()


def test_pictures_are_made_and_the_base_is_held_in_fp16(tmp_path: Path, tiny_sdxl: Path) -> None:
    run = halves(tmp_path, tiny_sdxl, validation_step_interval=2)
    assert run.train(max_train_steps=2) == 0
    assert list(run.out.rglob("*.png"))
    told = json.loads((run.out / "run.json").read_text())["summary"]["precision"]
    assert told.startswith("float16 on cpu, trained in float32; unet in float16")


def test_a_base_in_another_half_is_refused(
    tmp_path: Path, tiny_sdxl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = halves(tmp_path, tiny_sdxl, base_model_default_dtype="bf16")
    assert run.train() == 2
    said = capsys.readouterr().err
    assert (
        "bf16 does not go with mixed_precision fp16: remove it, or set mixed_precision to" in said
    )
