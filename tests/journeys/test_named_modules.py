"""Runs that train named modules whole, alone and beside a LoRA, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from simpletuner.apps.cli import main
from tests.runs import Run, make_pictures

Captured = pytest.CaptureFixture[str]
PICTURE = "validation_images/step_4_validation_0_64x96"
PARTS = {"sdxl": "unet", "sd1x": "unet", "sd3": "transformer", "flux": "transformer"}
NAMES = {
    "sdxl": "conv_in,*.norm?,time_embedding,down_blocks.0.resnets.0",
    "sd1x": "conv_in,*.norm?,time_embedding,down_blocks.0.resnets.0",
    "sd3": "pos_embed,context_embedder,norm1,norm_q,time_text_embed,dit.proj_out",
    "flux": "x_embedder,context_embedder,norm1,norm_q,time_text_embed,dit.proj_out",
}
"""First, last and inner layers, norms, and what makes the timestep."""


def run_of(root: Path, model: Path, **settings: Any) -> Run:
    run = Run(root, model)
    run.settings |= {"learning_rate": 1e-3, "validation_disable": True, **settings}
    return run


def said_lines(out: str) -> str:
    lines = out.partition("use them:\n")[2].splitlines()
    return "\n".join(line.strip() for line in lines if line.startswith("  "))


def paint(pipe: Any, run: Run) -> np.ndarray:
    """What the stock pipeline makes of the recipe of the run's last picture, 0 … 255."""
    recipe = json.loads((run.out / f"{PICTURE}.json").read_text())
    told = ("prompt", "negative_prompt", "width", "height", "guidance_scale")
    more = ("num_inference_steps", "max_sequence_length")
    image = pipe(
        **{name: recipe[name] for name in (*told, *more) if name in recipe},
        generator=torch.Generator("cpu").manual_seed(recipe["seed"]),
        output_type="np",
    ).images[0]
    return np.asarray(image * 255)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
@pytest.mark.parametrize("more", [{}, {"use_ema": True, "train_text_encoder": True}])
def test_the_printed_lines_paint_the_runs_own_picture_with_diffusers_alone(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: Captured,
    family: str,
    more: dict[str, Any],
) -> None:
    model = request.getfixturevalue(f"tiny_{family}")
    run = run_of(tmp_path, model, model_family=family, learning_rate=1e-2, **more)
    names = {"trainable_models": NAMES[family]}
    assert run.train(validation_disable=False, validation_seed=7, **names) == 0
    lines = said_lines(capsys.readouterr().out)
    assert f'.load_state_dict(load_file("{run.out}/{PARTS[family]}_weights' in lines
    found: dict[str, Any] = {}
    exec(lines, found)
    ours = np.asarray(Image.open(run.out / f"{PICTURE}.png"))
    assert np.abs(paint(found["pipe"], run) - ours).max() <= 1
    # and without the second file it is another
    less = "\n".join(line for line in lines.splitlines() if "load_state_dict" not in line)
    exec(less, found)
    assert np.abs(paint(found["pipe"], run) - ours).max() > 1


def test_they_are_used_on_the_base_with_its_preset_and_comfyuis_file_is_made_of_a_finished_run(
    tmp_path: Path, tiny_sdxl: Path, capsys: Captured
) -> None:
    first = run_of(tmp_path / "first", tiny_sdxl, learning_rate=5e-2)
    assert first.train() == 0
    run = run_of(tmp_path / "second", tiny_sdxl, learning_rate=1e-2, validation_disable=False)
    run.settings |= {"trainable_models": "conv_in,to_k", "peft_lora_target_modules": ["to_q"]}
    run.settings |= {"preset_lora_path": str(first.out), "validation_seed": 7}
    capsys.readouterr()
    assert run.train() == 0
    found: dict[str, Any] = {}
    exec(said_lines(capsys.readouterr().out), found)
    ours = np.asarray(Image.open(run.out / f"{PICTURE}.png"))
    assert np.abs(paint(found["pipe"], run) - ours).max() <= 1

    file = run.out / "pytorch_lora_weights.safetensors"
    assert main(["export", str(run.out), "--to", "comfyui"]) == 2
    assert "start the run again with lora_format comfyui" in capsys.readouterr().err
    before = file.read_bytes()
    assert run.train(lora_format="comfyui") == 0
    assert file.read_bytes() == before
    made = load_file(run.out / "pytorch_lora_weights.comfyui.safetensors")
    bias = made["diffusion_model.input_blocks.0.0.diff_b"]
    base = load_file(tiny_sdxl / "unet/diffusion_pytorch_model.safetensors")
    trained = load_file(run.out / "unet_weights.safetensors")
    torch.testing.assert_close(bias, trained["conv_in.bias"] - base["conv_in.bias"])


@pytest.mark.parametrize("family", PARTS)
def test_every_named_weight_learns_beside_a_bf16_base_and_the_rest_stays(
    tmp_path: Path, request: pytest.FixtureRequest, capsys: Captured, family: str
) -> None:
    """Under autocast, recomputed, with an average, and looked at while it trains."""
    model, part = request.getfixturevalue(f"tiny_{family}"), PARTS[family]
    run = run_of(
        tmp_path,
        model,
        model_family=family,
        trainable_models=NAMES[family],
        mixed_precision="bf16",
        gradient_checkpointing=True,
        use_ema=True,
        validation_disable=False,
    )
    assert run.train() == 0
    assert f"weights of the {part} whole" in capsys.readouterr().out
    held = load_file(run.out / "checkpoint-4/trainable.safetensors")
    average = load_file(run.out / "checkpoint-4/ema.safetensors")
    assert average.keys() == held.keys()
    written = load_file(run.out / f"{part}_weights.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    (base,) = (model / part).glob("*.safetensors")
    before = load_file(base)
    assert len(written) > 10
    for name, tensor in written.items():
        assert torch.equal(tensor, average[name])
        assert not torch.equal(tensor, before[name].bfloat16().float()), name
    assert written.keys() == {name for name in held if ".lora_" not in name}


def test_the_line_of_diffsynths_documents_trains_all_of_the_denoiser_and_named_parts_these(
    tmp_path: Path, tiny_sdxl: Path, capsys: Captured
) -> None:
    run = run_of(tmp_path, tiny_sdxl, max_train_steps=3, learning_rate=1e-4)
    del run.settings["model_type"], run.settings["lora_rank"]
    before = load_file(tiny_sdxl / "unet/diffusion_pytorch_model.safetensors")
    for names, said in (("dit", "the whole unet"), ("conv_in,norm3", "conv_in, norm3 of the unet")):
        run.settings["output_dir"] = str(tmp_path / names)
        words = ["train", "--config", str(run.write()), "--trainable_models", names]
        assert main(words) == 0
        assert f"method: full, {said}," in capsys.readouterr().out
        after = load_file(run.out / "unet/diffusion_pytorch_model.safetensors")
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        some = {n for n in before if n.startswith("conv_in.") or ".norm3." in n}
        assert moved == (set(before) if names == "dit" else some)


def test_a_name_that_fits_nothing_is_told_before_anything_is_encoded(
    tmp_path: Path, tiny_sdxl: Path, capsys: Captured
) -> None:
    run = run_of(tmp_path, tiny_sdxl, trainable_models="conv_inn")
    assert run.train() == 2
    said = capsys.readouterr().err
    assert "trainable_models: nothing of the unet is called 'conv_inn'" in said
    assert "the nearest are conv_in" in said
    assert run.train(trainable_models="conv_in", peft_lora_target_modules=["to_qq"]) == 2
    assert "no module of the model is called 'to_qq'" in capsys.readouterr().err
    assert {event["stage"] for event in run.events("stage")} == {"index pictures"}


def test_they_learn_beside_fp16_and_a_scaled_loss(tmp_path: Path, tiny_sdxl: Path) -> None:
    names = {"trainable_models": "conv_in,norm3", "peft_lora_target_modules": ["to_q"]}
    run = run_of(tmp_path, tiny_sdxl, mixed_precision="fp16", **names)
    assert run.train(max_train_steps=6) == 0
    written = load_file(run.out / "unet_weights.safetensors")
    before = load_file(tiny_sdxl / "unet/diffusion_pytorch_model.safetensors")
    same = [n for n, t in written.items() if torch.equal(t, before[n].half().float())]
    assert same == []


def test_other_names_are_not_gone_on_with(
    tmp_path: Path, tiny_sdxl: Path, capsys: Captured
) -> None:
    run = run_of(tmp_path, tiny_sdxl, lr_scheduler="constant", trainable_models="conv_in")
    assert run.train(max_train_steps=2) == 0
    capsys.readouterr()
    assert run.train(trainable_models="conv_out") == 7
    said = capsys.readouterr().err
    assert "trainable_models changed (was conv_in, now conv_out)" in said


def test_weights_that_wait_elsewhere_leave_those_that_train_in_their_place(
    tmp_path: Path, tiny_sdxl: Path
) -> None:
    """Numbers are those of a run that keeps all of it on the device."""
    pictures = make_pictures(tmp_path / "pictures")
    found = []
    for name, more in (("all", {}), ("waiting", {"musubi_blocks_to_swap": 1})):
        run = Run(tmp_path / name, tiny_sdxl, pictures)
        run.settings |= {"validation_disable": True, "gradient_checkpointing": True, **more}
        run.settings["trainable_models"] = "norm3"
        assert run.train() == 0
        found.append(load_file(run.out / "unet_weights.safetensors"))
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())
