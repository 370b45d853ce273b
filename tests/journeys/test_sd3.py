"""SD3 from a folder of pictures to a LoRA, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

from tests.runs import Run, make_pictures

PICTURE = "validation_images/step_4_validation_0_64x96"
MODULES = 2 * 4 + 4  # attention of both blocks, and the first one's second attention


def sd3(root: Path, model: Path, pictures: Path | None = None) -> Run:
    run = Run(root, model, pictures)
    run.settings["model_family"] = "sd3"
    return run


@pytest.fixture(scope="module")
def done(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One finished run with alpha unlike rank; read it only."""
    run = sd3(tmp_path_factory.mktemp("sd3"), tiny_sd3)
    settings = {"lora_alpha": 10, "learning_rate": 1e-2, "validation_negative_prompt": "blurry"}
    assert run.train(**settings, validation_guidance=4.0, validation_seed=7) == 0
    return run


def test_the_exported_lora_is_verified_whole(done: Run) -> None:
    result = json.loads((done.out / "run.json").read_text())["result"]
    assert result["verified"] == f"verified: {MODULES} of {MODULES} modules"
    assert result["steps"] == 4
    names = load_file(done.out / "pytorch_lora_weights.safetensors")
    assert len(names) == 2 * MODULES
    assert all(name.startswith("transformer.transformer_blocks.") for name in names)


def test_the_stock_pipeline_with_the_lora_paints_the_validation_picture(
    done: Run, tiny_sd3: Path
) -> None:
    recipe = json.loads((done.out / f"{PICTURE}.json").read_text())
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(done.out / recipe["weights"])

    def paint(**changes: Any) -> np.ndarray:
        told = ("prompt", "negative_prompt", "width", "height", "guidance_scale")
        more = ("num_inference_steps", "max_sequence_length")
        return pipe(
            **{**{name: recipe[name] for name in (*told, *more)}, **changes},
            generator=torch.Generator("cpu").manual_seed(recipe["seed"]),
            output_type="np",
        ).images[0]

    stock = paint()
    ours = np.asarray(Image.open(done.out / f"{PICTURE}.png"))
    assert np.array_equal((stock * 255).round().astype(np.uint8), ours)
    assert recipe["max_sequence_length"] == 154
    assert np.abs(paint(max_sequence_length=77) - stock).max() > 1e-5
    pipe.unload_lora_weights()
    assert np.abs(paint() - stock).max() > 1e-5  # the adapter is what makes the picture


def test_training_goes_on_bit_for_bit_after_a_resume(tmp_path: Path, tiny_sd3: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures")
    straight = sd3(tmp_path / "straight", tiny_sd3, pictures)
    broken = sd3(tmp_path / "broken", tiny_sd3, pictures)
    more = {
        "lora_dropout": 0.1,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "constant",
        "flow_schedule_auto_shift": True,
        "sd3_clip_uncond_behaviour": "zero",
        "caption_dropout_probability": 0.5,
    }
    assert straight.train(max_train_steps=5, **more) == 0
    assert broken.train(max_train_steps=2, **more) == 0
    assert broken.train(max_train_steps=5, **more) == 0
    assert broken.losses() == straight.losses()
    assert len(straight.losses()) == 5
    for part in ("trainable", "optimizer", "pytorch_lora_weights"):
        one, other = (
            load_file(run.out / f"checkpoint-5/{part}.safetensors") for run in (straight, broken)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_bf16_run_with_gradient_checkpointing_ends_well(tmp_path: Path, tiny_sd3: Path) -> None:
    run = sd3(tmp_path, tiny_sd3)
    settings = {"mixed_precision": "bf16", "gradient_checkpointing": True, "t5_padding": "zero"}
    assert run.train(**settings, tokenizer_max_length=77, max_train_steps=3) == 0
    assert run.events()[-1]["verified"] == f"verified: {MODULES} of {MODULES} modules"
    recipe = json.loads((run.out / "validation_images/step_3_validation_0_64x96.json").read_text())
    assert recipe["max_sequence_length"] == 77
    assert recipe["text_options"]["t5_padding"] == "zero"


def test_a_datasets_own_alignment_that_does_not_fit_is_refused_before_anything_is_encoded(
    tmp_path: Path, tiny_sd3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = sd3(tmp_path, tiny_sd3)
    run.dataset |= {"aspect_bucket_alignment": 24, "resolution": 72}
    assert run.train() == 3
    assert "cut to a multiple of 24 px, sd3 needs 16" in capsys.readouterr().err
    assert not (run.out / "cache" / "vae").exists()
