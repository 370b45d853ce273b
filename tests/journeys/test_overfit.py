"""Every method learns one picture of the example, and what is exported is what was learnt."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from simpletuner.config.find import examples_folder
from tests.emoji import EMOJI, FOLDER
from tests.runs import Run

DATA = examples_folder() / "emoji/data"
LOKR = {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 4}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora_rank": 16, "learning_rate": 5e-3},
    "dora": {"lora_rank": 16, "learning_rate": 5e-3, "use_dora": True},
    "lokr": {"lora_type": "lycoris", "lycoris_config": LOKR, "learning_rate": 5e-3},
    "full": {"model_type": "full", "learning_rate": 5e-4},
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"mixed_precision": "no"},
    "bf16": {"mixed_precision": "bf16"},
    "int8": {"mixed_precision": "no", "base_model_precision": "int8-quanto"},
}
CELLS = [(m, p) for m in METHODS for p in PRECISIONS if (m, p) != ("full", "int8")]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("overfit") / "bell"
    folder.mkdir()
    for ending in ("webp", "txt"):
        shutil.copy(DATA / f"bell.{ending}", folder)
    return folder


def loaded(out: Path, method: str) -> StableDiffusionXLPipeline:
    """The stock pipeline with what was exported, in fp32."""
    pipe = StableDiffusionXLPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if method == "full":
        pipe.unet = UNet2DConditionModel.from_pretrained(out / "unet", torch_dtype=torch.float32)
    elif method == "lokr":
        from lycoris import create_lycoris_from_weights

        file = str(out / "pytorch_lora_weights.safetensors")
        create_lycoris_from_weights(1.0, file, pipe.unet)[0].apply_to()
    elif method:
        pipe.load_lora_weights(out)
    return pipe


@torch.no_grad()
def loss_of(pipe: StableDiffusionXLPipeline) -> float:
    """The mean loss on the picture over fixed noise and sixteen timesteps."""
    pixels = np.asarray(Image.open(DATA / "bell.webp").convert("RGBA"))
    white = Image.alpha_composite(
        Image.new("RGBA", pixels.shape[1::-1], "white"), Image.fromarray(pixels)
    ).convert("RGB")
    resized = np.asarray(white.resize((128, 128), Image.Resampling.LANCZOS)).copy()
    image = torch.from_numpy(resized).permute(2, 0, 1)[None] / 127.5 - 1
    latents = pipe.vae.encode(image).latent_dist.mean * pipe.vae.config.scaling_factor
    text, _, pooled, _ = pipe.encode_prompt(
        (DATA / "bell.txt").read_text().strip(), device="cpu", do_classifier_free_guidance=False
    )
    timesteps = torch.arange(30, 1000, 62)
    noise = torch.randn(
        len(timesteps), *latents.shape[1:], generator=torch.Generator().manual_seed(3)
    )
    told = {
        "text_embeds": pooled.expand(len(timesteps), -1),
        "time_ids": torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]] * len(timesteps)),
    }
    noisy = pipe.scheduler.add_noise(latents.expand_as(noise), noise, timesteps)
    answer = pipe.unet(
        noisy,
        timesteps,
        encoder_hidden_states=text.expand(len(timesteps), -1, -1),
        added_cond_kwargs=told,
    ).sample
    wanted = noise
    if pipe.scheduler.config.prediction_type == "v_prediction":
        scale = pipe.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        wanted = scale.sqrt() * noise - (1 - scale).sqrt() * latents
    return float(torch.nn.functional.mse_loss(answer, wanted))


@cache
def base_loss() -> float:
    from diffusers import DDPMScheduler

    pipe = loaded(Path(), "")
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    return loss_of(pipe)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "precision"), CELLS)
def test_one_picture_is_learnt_and_exported(
    tmp_path: Path, picture: Path, method: str, precision: str
) -> None:
    from diffusers import DDPMScheduler

    run = Run(tmp_path, EMOJI, picture)
    run.settings |= {
        "train_batch_size": 1,
        "max_train_steps": 200,
        "checkpoint_step_interval": 0,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 10,
        "validation_prompt": "a 3D emoji of a bell",
        "validation_resolution": "128x128",
        "validation_guidance": 3.0,
        "validation_num_inference_steps": 6,
        **METHODS[method],
        **PRECISIONS[precision],
    }
    run.dataset |= {"caption_strategy": "textfile", "resolution": 128, "resolution_type": "pixel"}
    assert run.train() == 0

    pipe = loaded(run.out, method)
    recipe = json.loads(
        (run.out / "validation_images/step_200_validation_0_128x128.json").read_text()
    )
    told = ("prompt", "negative_prompt", "width", "height", "guidance_scale")
    stock = pipe(
        **{name: recipe[name] for name in (*told, "num_inference_steps")},
        generator=torch.Generator("cpu").manual_seed(recipe["seed"]),
        output_type="np",
    ).images[0]
    file = run.out / "validation_images/step_200_validation_0_128x128.png"
    apart = np.abs(stock * 255 - np.asarray(Image.open(file)).astype(float)).mean()
    assert apart < {"fp32": 0.6, "bf16": 8.0, "int8": 8.0}[precision]
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    fall = 1 - loss_of(pipe) / base_loss()
    print(f"{method} {precision}: the loss falls by {fall:.0%}, pictures differ by {apart:.2f}")
    assert fall >= 0.5
