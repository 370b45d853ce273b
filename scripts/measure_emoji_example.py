"""Measure what the emoji example learnt, with diffusers and peft alone.

    python scripts/measure_emoji_example.py output/emoji/pytorch_lora_weights.safetensors

The loss at fixed noise and timesteps, on the pictures it was trained with and on those held out,
without the LoRA and with it at several strengths. At strength 0 samples must be the base's.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "simpletuner" / "models" / "embedded" / "emoji-sdxl"
EXAMPLE = ROOT / "config" / "examples" / "emoji"
TIMESTEPS = (100, 300, 500, 700, 900)
BATCH = 8
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PROMPTS = ("a 3D emoji of a dog face", "a 3D emoji of a red apple")


@dataclass(frozen=True)
class Measured:
    """Losses by strength of the LoRA; `base` is without it."""

    base: dict[str, float]
    by_strength: dict[str, dict[float, float]]
    zero_is_base: bool

    def fall(self, part: str, strength: float = 1.0) -> float:
        """By what share the loss of a part is lower than the base's."""
        return 1 - self.by_strength[part][strength] / self.base[part]


def measure(
    lora: Path, *, strengths: tuple[float, ...] = STRENGTHS, most: int | None = None
) -> Measured:
    """Every loss, and whether samples at strength 0 are bit-equal to the base's.

    Args:
        most: Pictures of each part; all without it.
    """
    pipe = StableDiffusionXLPipeline.from_pretrained(BASE, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    parts = {part: _encoded(pipe, EXAMPLE / part, most) for part in ("data", "held_out")}
    base = {part: _loss(pipe, latents, text) for part, (latents, text) in parts.items()}
    untouched = _sample(pipe)
    pipe.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="lora")
    losses: dict[str, dict[float, float]] = {part: {} for part in parts}
    zero_is_base = True
    for strength in strengths:
        pipe.set_adapters("lora", strength)
        for part, (latents, text) in parts.items():
            losses[part][strength] = _loss(pipe, latents, text)
        if strength == 0:
            zero_is_base = np.array_equal(_sample(pipe), untouched)
    return Measured(base, losses, zero_is_base)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("lora", type=Path)
    torch.set_flush_denormal(True)
    measured = measure(parser.parse_args().lora)
    print(f"{'loss':10} {'base':>8}" + "".join(f"{strength:>9g}" for strength in STRENGTHS))
    for part, losses in measured.by_strength.items():
        row = "".join(f"{loss:9.4f}" for loss in losses.values())
        print(f"{part:10} {measured.base[part]:8.4f}{row}  falls by {measured.fall(part):.1%}")
    print(f"strength 0 samples as the base does: {'yes' if measured.zero_is_base else 'NO'}")


Text = tuple[torch.Tensor, torch.Tensor]


def pictures_of(folder: Path, most: int | None = None) -> dict[str, torch.Tensor]:
    """The pictures of a folder by name, on white: [3, 128, 128] in [-1, 1]."""
    found = {}
    for path in sorted(folder.glob("*.webp"))[:most]:
        picture = Image.open(path).convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        pixels = torch.from_numpy(np.array(flat.convert("RGB"))).permute(2, 0, 1)
        found[path.stem] = pixels.float() / 127.5 - 1
    return found


@torch.no_grad()
def _encoded(
    pipe: StableDiffusionXLPipeline, folder: Path, most: int | None
) -> tuple[torch.Tensor, Text]:
    """Scaled latents [N, 4, 32, 32] and text (states [N, 77, D], pooled [N, D']) of a folder."""
    pictures = pictures_of(folder, most)
    captions = [(folder / f"{name}.txt").read_text(encoding="utf-8").strip() for name in pictures]
    means = pipe.vae.encode(torch.stack(list(pictures.values()))).latent_dist.mean
    states, _, pooled, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
    return means * pipe.vae.config.scaling_factor, (states, pooled)


@torch.no_grad()
def _loss(pipe: StableDiffusionXLPipeline, latents: torch.Tensor, text: Text) -> float:
    """The mean squared error of v over all pictures and `TIMESTEPS`, the noise always the same."""
    generator = torch.Generator().manual_seed(0)
    alphas = pipe.scheduler.alphas_cumprod
    states, pooled = text
    ids = torch.tensor([[128.0, 128, 0, 0, 128, 128]]).expand(len(latents), -1)
    errors = []
    for timestep in TIMESTEPS:
        noise = torch.randn(latents.shape, generator=generator)
        signal, sigma = alphas[timestep].sqrt(), (1 - alphas[timestep]).sqrt()
        target = signal * noise - sigma * latents
        for part in torch.arange(len(latents)).split(BATCH):
            made = pipe.unet(
                signal * latents[part] + sigma * noise[part],
                timestep,
                encoder_hidden_states=states[part],
                added_cond_kwargs={"text_embeds": pooled[part], "time_ids": ids[part]},
            ).sample
            errors.append((made - target[part]).square().flatten(1).mean(1))
    return float(torch.cat(errors).mean())


def _sample(pipe: StableDiffusionXLPipeline) -> np.ndarray:
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    return pipe(
        list(PROMPTS),
        height=128,
        width=128,
        num_inference_steps=8,
        guidance_scale=3.0,
        generator=generators,
        output_type="np",
    ).images


if __name__ == "__main__":
    main()
