"""Runs with an average: it is what is saved, and a resumed run has the same one bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.runs import Run, make_pictures

SETTINGS = {"use_ema": True, "ema_decay": 0.9, "lr_scheduler": "constant"}


def run_of(root: Path, model: Path, pictures: Path, **settings: object) -> Run:
    run = Run(root, model, pictures)
    run.settings |= {"validation_disable": True, "checkpoint_step_interval": 3, **settings}
    return run


def files(run: Run, step: int) -> dict[str, dict[str, torch.Tensor]]:
    folder = run.out / f"checkpoint-{step}"
    names = ("trainable", "ema", "pytorch_lora_weights")
    return {name: load_file(folder / f"{name}.safetensors") for name in names}


def test_the_average_is_what_is_saved_and_it_resumes_bit_for_bit(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    pictures = make_pictures(tmp_path / "pictures")
    whole = run_of(tmp_path / "whole", tiny_sdxl, pictures, **SETTINGS)
    parts = run_of(tmp_path / "parts", tiny_sdxl, pictures, **SETTINGS)
    plain = run_of(tmp_path / "plain", tiny_sdxl, pictures, lr_scheduler="constant")
    assert whole.train(max_train_steps=6) == 0
    assert parts.train(max_train_steps=3) == 0
    assert parts.train(max_train_steps=6) == 0
    assert plain.train(max_train_steps=6) == 0

    ours, theirs = files(whole, 6), files(parts, 6)
    for name, tensors in ours.items():
        assert tensors.keys() == theirs[name].keys()
        assert all((tensors[key] == theirs[name][key]).all() for key in tensors), name
    for key, tensor in ours["ema"].items():
        assert torch.equal(ours["pytorch_lora_weights"][f"unet.{key}"], tensor)
    assert any(not torch.equal(ours["ema"][key], ours["trainable"][key]) for key in ours["ema"])
    # Training itself does not know of it.
    assert plain.losses() == whole.losses()


def test_a_checkpoint_without_an_average_begins_one(tiny_sdxl: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", tiny_sdxl, make_pictures(tmp_path / "pictures"))
    run.settings["lr_scheduler"] = "constant"
    assert run.train(max_train_steps=3) == 0
    assert run.train(max_train_steps=6, use_ema=True) == 0
    assert "holds no average" in run.notices()
