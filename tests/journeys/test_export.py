"""What a run with all weights, or with LyCORIS, gives to other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner.apps.cli import main
from simpletuner.core.tensors import header
from simpletuner.models.families.flux import Flux
from simpletuner.models.single_file import from_original
from tests.runs import Run
from tests.tiny.single_file import build_sdxl_of_two_widths, configs_of

Captured = pytest.CaptureFixture[str]
WEIGHTS = "diffusion_pytorch_model.safetensors"
LOKR = {"algo": "lokr", "linear_dim": 2, "linear_alpha": 3, "factor": 4}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def trained(root: Path, model: Path, family: str, **settings: Any) -> Run:
    run = Run(root, model)
    run.settings |= {"model_family": family, "validation_disable": True, **settings}
    assert run.train(max_train_steps=2) == 0
    return run


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("full")
    model = build_sdxl_of_two_widths(root / "model")
    return trained(root / "run", model, "sdxl", model_type="full", learning_rate=1e-4)


def test_a_full_run_becomes_one_file_that_the_stock_pipeline_opens(
    full: Run, tmp_path: Path, capsys: Captured
) -> None:
    assert main(["export", str(full.out), "--to", "comfyui"]) == 0
    file = full.out / "model.comfyui.safetensors"
    assert capsys.readouterr().out.startswith(f"{file}\nverified: 577 tensors")
    model = Path(full.settings["pretrained_model_name_or_path"])
    configs = configs_of(model, tmp_path / "configs")
    pipe = diffusers.StableDiffusionXLPipeline.from_single_file(
        str(file), config=str(configs), local_files_only=True
    )
    assert same(pipe.unet.state_dict(), load_file(full.out / "unet" / WEIGHTS))
    base = diffusers.StableDiffusionXLPipeline.from_pretrained(model)
    assert same(pipe.vae.state_dict(), base.vae.state_dict())
    assert same(pipe.text_encoder_2.state_dict(), base.text_encoder_2.state_dict())
    facts = header(file)
    assert facts["modelspec.architecture"] == "stable-diffusion-xl-v1-base/full"
    assert facts["steps"] == "2"
    assert str(full.root) not in str(facts)
    file.unlink()


def test_a_checkpoint_becomes_a_whole_pipeline_or_a_denoiser_in_another_dtype(
    full: Run, tmp_path: Path
) -> None:
    folder = str(full.out / "checkpoint-2")
    words = ["export", folder, "--dtype", "bf16", "--output"]
    assert main([*words, str(tmp_path / "pipeline"), "--to", "diffusers"]) == 0
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    trained = load_file(full.out / "checkpoint-2/unet" / WEIGHTS)
    wanted = {name: tensor.bfloat16().float() for name, tensor in trained.items()}
    assert same(pipe.unet.state_dict(), wanted)
    file = tmp_path / "unet.safetensors"
    assert main([*words, str(file), "--to", "kohya", "--parts", "denoiser"]) == 0
    held = load_file(file)
    assert all(name.startswith("model.diffusion_model.") for name in held)
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}


def test_flux_s_transformer_becomes_a_file_for_comfyui(tiny_flux: Path, tmp_path: Path) -> None:
    run = trained(tmp_path, tiny_flux, "flux", model_type="full", learning_rate=1e-4)
    assert main(["export", str(run.out), "--to", "comfyui", "--parts", "denoiser"]) == 0
    begin = "model.diffusion_model."
    held = load_file(run.out / "transformer.comfyui.safetensors")
    bare = {name.removeprefix(begin): tensor for name, tensor in held.items()}
    assert same(from_original(bare, Flux.original), load_file(run.out / "transformer" / WEIGHTS))


def test_a_base_model_that_is_gone_is_asked_for(
    full: Run, tmp_path: Path, capsys: Captured
) -> None:
    alone = tmp_path / "alone/unet"
    alone.mkdir(parents=True)
    for name in ("config.json", WEIGHTS):
        (alone / name).write_bytes((full.out / "unet" / name).read_bytes())
    words = ["export", str(alone.parent), "--to", "comfyui"]
    assert main(words) == 2
    assert "name the base model with --base" in capsys.readouterr().err
    base = full.settings["pretrained_model_name_or_path"]
    assert main([*words, "--base", base]) == 0
    assert main([*words, "--base", base, "--model_family", "sd3"]) == 5
    assert "not a model of the family sd3" in capsys.readouterr().err
    (alone / WEIGHTS).unlink()
    assert main([*words, "--base", base]) == 5


@pytest.mark.parametrize(("family", "layout"), [("sdxl", "kohya"), ("flux", "comfyui")])
def test_a_lokr_goes_through_another_layout_and_is_gone_on_from(
    family: str, layout: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: Captured
) -> None:
    model: Path = request.getfixturevalue(f"tiny_{family}")
    settings = {"lora_type": "lycoris", "lycoris_config": LOKR}
    run = trained(tmp_path / "one", model, family, lora_format=layout, **settings)
    ours, there = (
        run.out / f"pytorch_lora_weights{kind}.safetensors" for kind in ("", f".{layout}")
    )
    begins = {"kohya": ("lora_unet_",), "comfyui": ("diffusion_model.", "transformer.")}[layout]
    names = load_file(there)
    assert all(name.startswith(begins) for name in names)
    known = {
        "kohya": "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q.lokr_w1",
        "comfyui": "diffusion_model.double_blocks.1.img_attn.proj.lokr_w1",
    }
    assert known[layout] in names
    if family == "flux":  # a narrow UNet has not the blocks that convert-lora knows
        back = tmp_path / "back.safetensors"
        assert main(["convert-lora", str(there), "--to", "diffusers", "--output", str(back)]) == 0
        assert "verified: " in capsys.readouterr().out
        assert same(load_file(back), load_file(ours))

    again = trained(
        tmp_path / "two",
        model,
        family,
        init_lora=str(there),
        lr_scheduler="constant",
        learning_rate=1e-12,
        **settings,
    )
    one, other = load_file(ours), load_file(again.out / ours.name)
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_a_lokr_of_a_part_of_a_matrix_has_no_name_with_kohya(
    tmp_path: Path, capsys: Captured
) -> None:
    file = tmp_path / "lokr.safetensors"
    module = "lycoris_transformer_blocks_0_attn_to_q"
    save_file({f"{module}.{leaf}": torch.zeros(2, 2) for leaf in ("lokr_w1", "lokr_w2")}, file)
    assert main(["convert-lora", str(file), "--to", "kohya", "--model_family", "flux"]) == 5
    said = capsys.readouterr().err
    assert "transformer_blocks.0.attn.to_q is a part of a matrix" in said
    assert main(["convert-lora", str(file), "--to", "kohya", "--model_family", "sdxl"]) == 5
    assert f"{module} is no module of the unet" in capsys.readouterr().err
    file.write_bytes(b"nothing")
    assert main(["convert-lora", str(file), "--to", "kohya", "--model_family", "flux"]) == 5
    assert "download it again" in capsys.readouterr().err
