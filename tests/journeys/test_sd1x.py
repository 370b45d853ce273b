"""Stable Diffusion 1 from a folder of pictures to a LoRA, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from tests.runs import Run
from tests.tiny.build import build_sd1x

PICTURE = "validation_images/step_4_validation_0_64x96"
MODULES = 4 * 2 * 4  # one transformer on the way down, one in the middle, two on the way up


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One finished run with alpha unlike rank, written in two layouts; read it only."""
    root = tmp_path_factory.mktemp("sd1x")
    run = Run(root, build_sd1x(root / "model", prediction_type=request.param))
    run.settings["model_family"] = "sd1x"
    settings = {"lora_alpha": 10, "learning_rate": 1e-2, "lora_format": "kohya"}
    more = {"validation_guidance": 4.0, "validation_negative_prompt": "blurry"}
    assert run.train(**settings, **more, validation_seed=7, snr_gamma=5.0) == 0
    return run


def test_the_exported_lora_is_verified_whole_and_has_kohyas_names_beside(done: Run) -> None:
    result = json.loads((done.out / "run.json").read_text())["result"]
    assert result["verified"] == f"verified: {MODULES} of {MODULES} modules"
    names = load_file(done.out / "pytorch_lora_weights.safetensors")
    assert len(names) == 2 * MODULES
    assert all(name.startswith("unet.") for name in names)
    other = load_file(done.out / "pytorch_lora_weights.kohya.safetensors")
    assert all(name.startswith("lora_unet_") for name in other)
    assert len(other) == 3 * MODULES


def test_the_printed_lines_sample_with_the_schedule_that_was_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """v and zero terminal SNR trained from a checkpoint that says neither."""
    run = Run(tmp_path, build_sd1x(tmp_path / "model"))
    run.settings["model_family"] = "sd1x"
    changed = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert run.train(**changed, learning_rate=1e-2, validation_seed=7) == 0
    _, _, printed = capsys.readouterr().out.partition("use them:\n")
    lines = [line.strip() for line in printed.splitlines() if line.startswith("  ")]
    found: dict[str, Any] = {}
    exec("\n".join(lines), found)
    pipe = found["pipe"]
    recipe = json.loads((run.out / f"{PICTURE}.json").read_text())
    told = ("prompt", "negative_prompt", "width", "height", "guidance_scale")
    stock = pipe(
        **{name: recipe[name] for name in (*told, "num_inference_steps")},
        generator=torch.Generator("cpu").manual_seed(recipe["seed"]),
        output_type="np",
    ).images[0]
    assert pipe.scheduler.config.rescale_betas_zero_snr
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    ours = np.asarray(Image.open(run.out / f"{PICTURE}.png"))
    assert np.abs(stock * 255 - ours).max() <= 1


def test_the_stock_pipeline_with_the_lora_paints_the_validation_picture(done: Run) -> None:
    recipe = json.loads((done.out / f"{PICTURE}.json").read_text())
    pipe = StableDiffusionPipeline.from_pretrained(done.root / "model")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(done.out / recipe["weights"])

    def paint() -> np.ndarray:
        told = ("prompt", "negative_prompt", "width", "height", "guidance_scale")
        return pipe(
            **{name: recipe[name] for name in (*told, "num_inference_steps")},
            generator=torch.Generator("cpu").manual_seed(recipe["seed"]),
            output_type="np",
        ).images[0]

    stock = paint()
    ours = np.asarray(Image.open(done.out / f"{PICTURE}.png"))
    assert np.array_equal((stock * 255).round().astype(np.uint8), ours)
    pipe.unload_lora_weights()
    assert np.abs(paint() - stock).max() > 1e-5  # the adapter is what makes the picture


def test_what_belongs_to_other_families_is_refused(
    tmp_path: Path, tiny_sd1x: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, tiny_sd1x)
    run.settings["model_family"] = "sd1x"
    assert run.train(flux_guidance_value=3.5, flow_schedule_auto_shift=True) == 2
    said = capsys.readouterr().err
    assert "flux_guidance_value       sd1x has no use for it, flux has; remove it" in said
    assert "flow_schedule_auto_shift  sd1x is not trained by flow matching" in said


def test_an_sdxl_checkpoint_is_refused(
    tmp_path: Path, tiny_sdxl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, tiny_sdxl)
    run.settings["model_family"] = "sd1x"
    assert run.train() == 5
    assert "not a model of the family sd1x" in capsys.readouterr().err
