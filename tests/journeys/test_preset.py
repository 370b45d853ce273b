"""A LoRA is fused into the base, and another one trained beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from simpletuner.adapters.preset import fuse
from simpletuner.core.errors import ConfigError
from tests.runs import Run, make_pictures
from tests.unit.adapters.test_lora import exported, forward, lora_on, trained
from tests.unit.models.test_sdxl import open_tiny

PICTURE = "validation_images/step_4_validation_0_64x96"


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_a_fused_lora_is_the_model_with_it(
    tiny_sdxl: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    lora = lora_on(tiny_sdxl, peft_lora_target_modules=["to_q", "conv1"], **more)
    for name, parameter in lora.parameters().items():
        if not name.endswith("magnitude_vector"):
            torch.nn.init.normal_(parameter, std=0.1)
    path = exported(lora, tmp_path)
    base = UNet2DConditionModel.from_pretrained(tiny_sdxl / "unet")
    fuse(base, str(path), open_tiny(tiny_sdxl))
    torch.testing.assert_close(forward(base), forward(lora.denoiser), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["comfyui", "kohya"])
def test_a_layout_of_other_tools_is_read_by_the_names_of_the_denoiser_at_hand(
    tiny_sdxl: Path, tmp_path: Path, layout: str
) -> None:
    """The tiny UNet's two narrow blocks have other original names than SDXL's three."""
    lora = trained(lora_on(tiny_sdxl, lora_format=layout))
    _, other = lora.export(tmp_path, {"base_model": "tiny"})
    base = UNet2DConditionModel.from_pretrained(tiny_sdxl / "unet")
    fuse(base, str(other), open_tiny(tiny_sdxl))
    torch.testing.assert_close(forward(base), forward(lora.denoiser), atol=1e-5, rtol=1e-5)


def test_a_lora_of_another_size_is_not_fused(tiny_sdxl: Path, tmp_path: Path) -> None:
    path = exported(trained(lora_on(tiny_sdxl)), tmp_path)
    state = {n: t[..., :-1] if "lora_A" in n else t for n, t in load_file(path).items()}
    save_file({n: t.contiguous() for n, t in state.items()}, path)
    base = UNet2DConditionModel.from_pretrained(tiny_sdxl / "unet")
    with pytest.raises(ConfigError, match="does not fit: the model has no such"):
        fuse(base, str(path), open_tiny(tiny_sdxl))


def test_the_second_lora_is_used_with_the_first_as_the_printed_lines_say(
    tmp_path: Path, tiny_sdxl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = make_pictures(tmp_path / "pictures")
    first = Run(tmp_path / "first", tiny_sdxl, pictures)
    assert first.train(learning_rate=5e-2, validation_disable=True) == 0
    preset = {"preset_lora_path": str(first.out)}
    second, alone = (Run(tmp_path / name, tiny_sdxl, pictures) for name in ("second", "alone"))
    capsys.readouterr()
    assert second.train(**preset, learning_rate=1e-2, validation_seed=7) == 0
    printed = capsys.readouterr().out.partition("use them:\n")[2]
    assert alone.train(learning_rate=1e-2, validation_disable=True) == 0
    assert second.losses()[0] != alone.losses()[0]  # the base is another from the first step on

    found: dict[str, Any] = {}
    exec("\n".join(ln.strip() for ln in printed.splitlines() if ln.startswith("  ")), found)
    pipe: StableDiffusionXLPipeline = found["pipe"]
    recipe = json.loads((second.out / f"{PICTURE}.json").read_text())
    told = ("prompt", "negative_prompt", "width", "height", "guidance_scale")
    stock = pipe(
        **{name: recipe[name] for name in (*told, "num_inference_steps")},
        generator=torch.Generator("cpu").manual_seed(recipe["seed"]),
        output_type="np",
    ).images[0]
    ours = np.asarray(Image.open(second.out / f"{PICTURE}.png"))
    assert np.abs(stock * 255 - ours).max() <= 1


def test_another_preset_is_not_gone_on_with(
    tmp_path: Path, tiny_sdxl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = make_pictures(tmp_path / "pictures")
    quiet = {"validation_disable": True, "lr_scheduler": "constant"}
    first = Run(tmp_path / "first", tiny_sdxl, pictures)
    assert first.train(**quiet, max_train_steps=2) == 0
    preset = {"preset_lora_path": str(first.out)}
    run = Run(tmp_path / "run", tiny_sdxl, pictures)
    assert run.train(**quiet, **preset, max_train_steps=2) == 0
    assert first.train(**quiet) == 0  # the same path, another file
    capsys.readouterr()
    assert run.train(**quiet, **preset) == 7
    assert "preset LoRA changed" in capsys.readouterr().err
    assert run.train(**quiet, preset_lora_path=str(tmp_path / "none.safetensors")) == 2
    assert "none.safetensors does not exist; correct the path" in capsys.readouterr().err
