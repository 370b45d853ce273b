"""FLUX.1 from a folder of pictures to a LoRA, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file

from tests.runs import Run, make_pictures
from tests.tiny.build import build_flux

PICTURE = "validation_images/step_4_validation_0_64x96"
MODULES = 2 * 8 + 2 * 3  # all attention of two double and two single blocks


def flux(root: Path, model: Path, pictures: Path | None = None) -> Run:
    run = Run(root, model, pictures)
    run.settings["model_family"] = "flux"
    return run


@pytest.fixture(scope="module")
def done(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One finished run with alpha unlike rank, written in two layouts; read it only."""
    run = flux(tmp_path_factory.mktemp("flux"), tiny_flux)
    settings = {"lora_alpha": 10, "learning_rate": 1e-2, "lora_format": "comfyui"}
    assert run.train(**settings, validation_guidance=3.0, validation_seed=7) == 0
    return run


def test_the_exported_lora_is_verified_whole_and_has_the_original_names_beside(done: Run) -> None:
    result = json.loads((done.out / "run.json").read_text())["result"]
    assert result["verified"] == f"verified: {MODULES} of {MODULES} modules"
    names = load_file(done.out / "pytorch_lora_weights.safetensors")
    assert len(names) == 2 * MODULES
    other = load_file(done.out / "pytorch_lora_weights.comfyui.safetensors")
    assert "diffusion_model.double_blocks.1.img_attn.qkv.lora_A.weight" in other
    assert "diffusion_model.single_blocks.1.linear1.alpha" in other


def test_the_stock_pipeline_with_the_lora_paints_the_validation_picture(
    done: Run, tiny_flux: Path
) -> None:
    recipe = json.loads((done.out / f"{PICTURE}.json").read_text())
    pipe = FluxPipeline.from_pretrained(tiny_flux)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(done.out / recipe["weights"])

    def paint(**changes: Any) -> np.ndarray:
        told = ("prompt", "width", "height", "guidance_scale", "num_inference_steps")
        return pipe(
            **{**{name: recipe[name] for name in (*told, "max_sequence_length")}, **changes},
            generator=torch.Generator("cpu").manual_seed(recipe["seed"]),
            output_type="np",
        ).images[0]

    stock = paint()
    ours = np.asarray(Image.open(done.out / f"{PICTURE}.png"))
    assert np.array_equal((stock * 255).round().astype(np.uint8), ours)
    assert recipe["max_sequence_length"] == 512
    pipe.unload_lora_weights()
    assert np.abs(paint() - stock).max() > 1e-5  # the adapter is what makes the picture


def test_training_goes_on_bit_for_bit_after_a_resume(tmp_path: Path, tiny_flux: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures")
    straight = flux(tmp_path / "straight", tiny_flux, pictures)
    broken = flux(tmp_path / "broken", tiny_flux, pictures)
    more = {
        "lr_scheduler": "constant",
        "flow_schedule_auto_shift": True,
        "flux_guidance_mode": "random-range",
        "flux_attention_masked_training": True,
        "flux_lora_target": "context+ffs",
        "gradient_checkpointing": True,
        "mixed_precision": "bf16",
        "validation_disable": True,
    }
    assert straight.train(max_train_steps=4, **more) == 0
    assert broken.train(max_train_steps=2, **more) == 0
    assert broken.train(max_train_steps=4, **more) == 0
    assert broken.losses() == straight.losses()
    one, other = (
        load_file(run.out / "pytorch_lora_weights.safetensors") for run in (straight, broken)
    )
    assert len(one) == 2 * 2 * 6
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_guidance_for_a_model_that_takes_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = flux(tmp_path / "run", build_flux(tmp_path / "schnell", guided=False))
    assert run.train(flux_guidance_value=3.5) == 2
    assert "flux_guidance_value: schnell has no use for it" in capsys.readouterr().err


def test_a_checkpoint_of_another_family_is_refused(
    tmp_path: Path, tiny_sd3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flux(tmp_path, tiny_sd3).train() == 5
    said = capsys.readouterr().err
    assert "is a StableDiffusion3Pipeline, not a model of the family flux" in said
