"""The bare reference: a LoRA step and an encoder loop written with diffusers and peft alone."""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from PIL import Image

from simpletuner.runtime.allocator import keep_freed_memory

torch.set_num_threads(1)  # the variables come too late if torch was imported before
keep_freed_memory()  # as ours does: what is compared is not the C library

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class BareStep:
    """One LoRA step on random latents. B batch, h w latent cells.

    Args:
        folder: A diffusers SDXL folder.
        batch: B.
        cells: (h, w).
        rank: Of the adapters.
        device: Where it runs.
    """

    def __init__(
        self,
        folder: Path,
        batch: int,
        cells: tuple[int, int],
        rank: int = 16,
        device: str = "cpu",
    ) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").to(device)
        self.unet.requires_grad_(False)
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
        self.unet.train()
        self.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.latents = torch.randn(batch, 4, *cells, device=device)
        self.text = torch.randn(batch, 77, 64, device=device)
        pooled, size = torch.randn(batch, 32, device=device), 8 * cells[0]
        ids = torch.tensor([[size, size, 0, 0, size, size]] * batch, dtype=torch.float32)
        ids = ids.to(device)
        self.added = {"text_embeds": pooled, "time_ids": ids}

    def __call__(self) -> None:
        """Draw, predict, loss, backward, clip, update."""
        noise = torch.randn_like(self.latents)
        t = torch.randint(0, 1000, (len(self.latents),), device=self.latents.device)
        noisy = self.scheduler.add_noise(self.latents, noise, t)
        answer = self.unet(
            noisy, t, encoder_hidden_states=self.text, added_cond_kwargs=self.added
        ).sample
        torch.nn.functional.mse_loss(answer, noise).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def encode(folder: Path, photos: list[Path], edge: int) -> None:
    """Captions one by one and pictures one by one, nothing kept."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, unet=None)
    with torch.no_grad():
        for path in photos:
            pipe.encode_prompt(path.stem.replace("_", " "), do_classifier_free_guidance=False)
        for pixels in pixels_of(photos, edge):
            pipe.vae.encode(pixels).latent_dist.sample()


def big_unet() -> UNet2DConditionModel:
    """An SDXL-like UNet of 48.8 M parameters that fits the tiny text encoders."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(80, 160, 320),
        layers_per_block=2,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        cross_attention_dim=64,
    )


def big_vae(width: int) -> AutoencoderKL:
    """An SDXL-shaped VAE; larger `width` makes it dearer."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        norm_num_groups=8,
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64,
        scaling_factor=0.13025,
    )


def make_photos(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """Smooth pictures with some noise, as JPEG; a photograph's work for a decoder."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(count):
        small = random.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))
        noisy = picture.astype(np.int16) + random.integers(-8, 8, picture.shape)
        pixels = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        pixels.save(folder / f"photo_{number}.jpg", quality=90)
    return folder


def write_run(root: Path, model: Path, entry: dict[str, Any], **settings: Any) -> Path:
    """The two settings files of a run in fp32 without pictures; returns config.json."""
    (root / "multidatabackend.json").write_text(json.dumps([entry]))
    always = {
        "model_family": "sdxl",
        "pretrained_model_name_or_path": str(model),
        "output_dir": str(root / "out"),
        "mixed_precision": "no",
        "gradient_checkpointing": False,
        "validation_disable": True,
    }
    config = root / "config.json"
    config.write_text(json.dumps(always | settings))
    return config


def pixels_of(paths: list[Path], edge: int) -> Iterator[torch.Tensor]:
    """Pictures as [1, 3, edge, edge] in [-1, 1]: decode, resize, centre crop."""
    for path in paths:
        with Image.open(path) as image:
            short = min(image.size)
            width, height = (round(side * edge / short) for side in image.size)
            resized = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        left, top = (width - edge) // 2, (height - edge) // 2
        array = np.asarray(resized.crop((left, top, left + edge, top + edge)))
        yield torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
