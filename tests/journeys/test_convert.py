"""`simpletuner export` and `convert-lora`: what a run trained, in another tool's layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, UNet2DConditionModel
from safetensors.torch import load_file

from simpletuner.adapters.formats import read_changes
from simpletuner.apps.cli import main
from simpletuner.models.families import FAMILIES
from tests.runs import Run

MODEL = "pretrained_model_name_or_path"


@pytest.fixture(scope="module")
def run(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("convert") / "run", tiny_sd3)
    run.settings |= {"model_family": "sd3", "validation_disable": True, "lora_alpha": 6}
    assert run.train(max_train_steps=2) == 0
    return run


def test_a_run_s_lora_goes_round_through_comfyui(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, back = tmp_path / "comfyui.safetensors", tmp_path / "back.safetensors"

    assert main(["export", str(run.out), "--to", "comfyui", "--output", str(there)]) == 0
    assert "verified: 12 of 12 modules" in capsys.readouterr().out
    keys = load_file(there)
    assert "diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight" in keys
    assert "diffusion_model.joint_blocks.0.x_block.attn.qkv.alpha" in keys

    assert main(["convert-lora", str(there), "--to", "diffusers", "--output", str(back)]) == 0
    first, last = run.out / "pytorch_lora_weights.safetensors", back
    pipes = [StableDiffusion3Pipeline.from_pretrained(run.settings[MODEL]) for _ in range(2)]
    for pipe, file in zip(pipes, (first, last), strict=True):
        pipe.load_lora_weights(file.parent, weight_name=file.name)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    was, now = (pipe.transformer.state_dict() for pipe in pipes)
    assert all(torch.allclose(was[name], now[name], atol=1e-6) for name in was)


def test_without_an_output_it_stands_beside_with_its_layout_s_name(run: Run) -> None:
    folder = run.out / "checkpoint-2"
    assert main(["export", str(folder), "--to", "kohya"]) == 0
    assert "lora_unet_joint_blocks_0_x_block_attn_proj.alpha" in load_file(
        folder / "pytorch_lora_weights.kohya.safetensors"
    )


def test_what_cannot_be_converted_says_what_to_do(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = run.out / "pytorch_lora_weights.safetensors"
    for words, code, said in (
        (["export", str(tmp_path), "--to", "kohya"], 2, "does not exist"),
        (
            ["convert-lora", str(lora), "--to", "kohya", "--model_family", "sdx"],
            2,
            "did you mean sdxl",
        ),
        (["convert-lora", str(lora), "--to", "kohya", "--output", str(lora)], 2, "the file itself"),
        (
            ["convert-lora", str(lora), "--to", "kohya", "--model_family", "sdxl"],
            5,
            "name the family it was made for",
        ),
    ):
        assert main(words) == code
        assert said in capsys.readouterr().err


def test_the_summary_of_the_run_travels_along(run: Run, tmp_path: Path) -> None:
    from simpletuner.core.tensors import header

    target = tmp_path / "kohya.safetensors"
    assert main(["export", str(run.out), "--to", "kohya", "--output", str(target)]) == 0
    facts = header(target)
    assert facts["ss_network_dim"] == "Dynamic"  # query, key and value are one matrix there
    assert facts["steps"] == "2"
    assert json.dumps(facts).count(str(run.root)) == 0


@pytest.mark.parametrize("layout", ["comfyui", "kohya"])
def test_a_run_writes_the_layout_it_is_asked_for_beside_its_own(
    layout: str, tiny_sdxl: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", tiny_sdxl)
    run.settings |= {"validation_disable": True, "lora_format": layout, "use_rslora": True}
    assert run.train(max_train_steps=2) == 0
    other = run.out / f"pytorch_lora_weights.{layout}.safetensors"
    assert other.is_file()
    assert (run.out / "checkpoint-2" / other.name).is_file()
    family = FAMILIES["sdxl"].load()
    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl / "unet")
    names = family.names_of(unet)  # of two narrow blocks, not of the real three
    first = read_changes(run.out / "pytorch_lora_weights.safetensors", family)
    second = read_changes(other, family, names)
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name].delta(), second[name].delta()) for name in first)
