"""Measures a built folder against what it must show, from the shipped weights alone.

N pictures, C channels, H W.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

from scripts.emoji_base import clip
from scripts.emoji_base.pictures import SIZE, floats, rows
from scripts.emoji_base.sheets import sheet
from scripts.emoji_base.text import PROMPT
from scripts.emoji_base.vae import SCALING, decode, encode, moments
from scripts.emoji_base.work import Work

STEPS = 20
GUIDANCE = 3.0
# name: (bound, whether more is better)
BOUNDS = {
    "vae held-out PSNR, dB": (28.0, True),
    "vae held-out 8x8 PSNR, 10th percentile, dB": (26.0, True),
    "vae latent variance, largest / smallest": (10.0, False),
    "vae Fluent 3D PSNR, dB": (26.0, True),
    "base nearest picture is the prompted one": (0.9, True),
    "base PSNR at 32 px, dB": (18.0, True),
    "clip right caption in top 10 (Fluent 3D)": (0.8, True),
    "pipeline MB": (16.0, False),
    "tiny_vae and clip MB": (8.0, False),
}


def measure(work: Work, built: Path) -> dict[str, float]:
    """Every number, also written to ``measured.json``; contact sheets lie beside it."""
    pipe = StableDiffusionXLPipeline.from_pretrained(built, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pictures = work.tensors("pictures.safetensors")
    numbers = _vae(work, pipe, pictures) | _tiny_vae(work, pipe, built, pictures)
    numbers |= _base(work, pipe, pictures["noto"][rows(work, "base")])
    numbers |= _clip(work, built, pictures["3d"]) | _sizes(built)
    for name, value in numbers.items():
        print(f"{name:45} {value:8.3f}  {verdict(name, value)}")
    work.save_facts("measured.json", numbers)
    return numbers


def verdict(name: str, value: float) -> str:
    """What the bound says of a number; nothing where there is no bound."""
    if name not in BOUNDS:
        return ""
    bound, more = BOUNDS[name]
    reached = value >= bound if more else value <= bound
    return f"{'reached' if reached else 'missed'} ({'≥' if more else '≤'} {bound:g})"


def psnr(made: Tensor, wanted: Tensor) -> Tensor:
    """[N] in dB, of [N, C, H, W] in [-1, 1]."""
    error = (made - wanted).square().flatten(1).mean(1).clamp(min=1e-10)
    return 10 * torch.log10(4 / error)


def _vae(
    work: Work, pipe: StableDiffusionXLPipeline, pictures: dict[str, Tensor]
) -> dict[str, float]:
    held_out = pictures["noto"][rows(work, "held_out")]
    unseen = pictures["3d"][rows(work, "held_out")]
    latents, variances = encode(pipe.vae, held_out)
    made, wanted = decode(pipe.vae, latents), floats(held_out)
    pooled = psnr(functional.avg_pool2d(made, 8), functional.avg_pool2d(wanted, 8))
    made_3d = decode(pipe.vae, encode(pipe.vae, unseen)[0])
    values = torch.linalg.eigvalsh(moments(latents * SCALING)[1])
    sheet(work.folder / "vae.png", [wanted[:32], made[:32], floats(unseen)[:32], made_3d[:32]])
    return {
        "vae held-out PSNR, dB": float(psnr(made, wanted).mean()),
        "vae held-out 8x8 PSNR, mean, dB": float(pooled.mean()),
        "vae held-out 8x8 PSNR, 10th percentile, dB": float(pooled.quantile(0.1)),
        "vae latent variance, largest / smallest": float(values[-1] / values[0]),
        "vae latent variance, mean": float(values.mean()),
        "vae posterior variance (latents 1)": float((variances * SCALING**2).mean()),
        "vae Fluent 3D PSNR, dB": float(psnr(made_3d, floats(unseen)).mean()),
    }


@torch.no_grad()
def _tiny_vae(
    work: Work, pipe: StableDiffusionXLPipeline, built: Path, pictures: dict[str, Tensor]
) -> dict[str, float]:
    tiny = AutoencoderTiny.from_pretrained(built / "tiny_vae", dtype=torch.float32)
    held_out = pictures["noto"][rows(work, "held_out")]
    latents, _ = encode(pipe.vae, held_out)
    full, quick = decode(pipe.vae, latents), decode(tiny, latents * SCALING)
    encoded = torch.cat([tiny.encode(part).latents for part in floats(held_out).split(16)])
    sheet(work.folder / "tiny_vae.png", [full[:32], quick[:32]])
    return {
        "tiny_vae PSNR against the picture, dB": float(psnr(quick, floats(held_out)).mean()),
        "tiny_vae PSNR against the VAE, dB": float(psnr(quick, full).mean()),
        "tiny_vae latent error (variance 1)": float((encoded - latents * SCALING).square().mean()),
    }


def _base(work: Work, pipe: StableDiffusionXLPipeline, wanted: Tensor) -> dict[str, float]:
    concepts = work.facts("concepts.json")
    prompts = [PROMPT.format(concepts[row]["phrase"]) for row in rows(work, "base")]
    made = sample(pipe, prompts, seed=work.seed)
    references = floats(wanted)
    small, target = functional.avg_pool2d(made, 4), functional.avg_pool2d(references, 4)
    nearest = torch.cdist(small.flatten(1), target.flatten(1)).argmin(1)
    pairs = [
        part for k in range(0, len(made), 16) for part in (references[k : k + 16], made[k : k + 16])
    ]
    sheet(work.folder / "base.png", pairs)
    right = (nearest == torch.arange(len(prompts))).float()
    return {
        "base concepts": float(len(prompts)),
        "base nearest picture is the prompted one": float(right.mean()),
        "base PSNR at 32 px, dB": float(psnr(small, target).mean()),
    }


def sample(pipe: StableDiffusionXLPipeline, prompts: list[str], *, seed: int) -> Tensor:
    """One picture for each prompt, by the stock pipeline: [N, 3, 128, 128] in [-1, 1]."""
    made = []
    for k in range(0, len(prompts), 16):
        part = prompts[k : k + 16]
        generators = [torch.Generator().manual_seed(seed + k + i) for i in range(len(part))]
        pictures = pipe(
            part,
            height=SIZE,
            width=SIZE,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generators,
            output_type="pt",
        ).images
        made.append(pictures.mul(2).sub(1))
    return torch.cat(made)


def _clip(work: Work, built: Path, unseen: Tensor) -> dict[str, float]:
    model = CLIPModel.from_pretrained(built / "clip", dtype=torch.float32)
    words = CLIPTokenizer.from_pretrained(built / "clip")
    captions = [concept["label"] for concept in work.facts("concepts.json")]
    places = clip.ranks(model, words, functional.avg_pool2d(floats(unseen), 2), captions)
    hits = {top: float((places < top).float().mean()) for top in (1, 5, 10)}
    return {"clip captions": float(len(captions))} | {
        f"clip right caption in top {top} (Fluent 3D)": hit for top, hit in hits.items()
    }


def _sizes(built: Path) -> dict[str, float]:
    files = {path: path.stat().st_size / 1e6 for path in built.rglob("*") if path.is_file()}
    extra = sum(
        size
        for path, size in files.items()
        if path.relative_to(built).parts[0] in ("tiny_vae", "clip")
    )
    return {"pipeline MB": sum(files.values()) - extra, "tiny_vae and clip MB": extra}
