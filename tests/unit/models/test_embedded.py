"""The embedded model: found by name, small, and trained; its numbers are measured anew, loosely."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline
from safetensors import safe_open
from torch import nn
from torch.nn import functional

from scripts.emoji_base.card import NOTICE
from simpletuner.core.errors import ConfigError
from simpletuner.models.embedded import embedded_folder
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings
from tests.emoji import EMOJI, FOLDER, fluent, likeness

PAINTED = ("red apple", "rocket", "rainbow", "octopus", "pizza", "crown", "bicycle", "frog")


@cache
def pipeline() -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def psnr(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((10 * torch.log10(4 / (made - wanted).square().flatten(1).mean(1))).mean())


def test_it_is_opened_by_its_name_and_predicts_what_its_scheduler_says() -> None:
    family = open_family(ModelSettings(model_family="sdxl", pretrained_model_name_or_path=EMOJI))

    assert family.checkpoint.label == EMOJI
    assert family.checkpoint.folder == FOLDER
    assert family.prediction_type == "v_prediction"


def test_it_has_no_revisions() -> None:
    settings = ModelSettings(
        model_family="sdxl", pretrained_model_name_or_path=EMOJI, revision="main"
    )
    with pytest.raises(ConfigError, match="which is on this machine"):
        open_family(settings)


@pytest.mark.parametrize("name", ["simpletuner/other", "simpletuner/..", "other/emoji-sdxl"])
def test_other_names_mean_the_hub(name: str) -> None:
    assert embedded_folder(name) is None


def test_it_is_small_and_all_weights_are_half_precision() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    beside = [path for path in files if path.relative_to(FOLDER).parts[0] in ("tiny_vae", "clip")]
    whole, added = (sum(path.stat().st_size for path in those) for those in (files, beside))
    assert whole - added <= 16e6
    assert added <= 8e6
    for path in FOLDER.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}
        assert kinds <= {"F16", "I64"}, path


def test_its_licences_are_named() -> None:
    assert (FOLDER / "NOTICE").read_text(encoding="utf-8") == NOTICE
    for source in ("Noto Emoji", "Fluent Emoji (flat", "Twemoji", "emojibase-data"):
        assert source in NOTICE


def test_every_linear_takes_a_multiple_of_16() -> None:
    widths = {m.in_features for m in pipeline().unet.modules() if isinstance(m, nn.Linear)}

    assert {width % 16 for width in widths} == {0}


def test_the_vae_shows_a_style_it_never_saw_and_needs_its_scale() -> None:
    pixels, _ = fluent()
    vae = pipeline().vae
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        made = vae.decode(latents).sample.clamp(-1, 1)
        unscaled = vae.decode(latents * vae.config.scaling_factor).sample.clamp(-1, 1)

    assert vae.config.scaling_factor == 0.13025
    assert psnr(made, pixels) > 26
    pooled = functional.avg_pool2d(made, 8), functional.avg_pool2d(pixels, 8)
    assert psnr(*pooled) > 30  # hue is kept
    spread = (latents * vae.config.scaling_factor).std((0, 2, 3))
    assert 0.4 < float(spread.min()) < float(spread.max()) < 2.5
    assert psnr(unscaled, pixels) < 15


def test_the_tiny_autoencoder_decodes_what_the_denoiser_makes() -> None:
    pixels = fluent()[0][:16]
    vae = pipeline().vae
    tiny = AutoencoderTiny.from_pretrained(FOLDER / "tiny_vae", dtype=torch.float32)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        full = vae.decode(latents).sample.clamp(-1, 1)
        quick = tiny.decode(latents * vae.config.scaling_factor).sample.clamp(-1, 1)

    assert psnr(quick, full) > 24


def test_its_clip_model_names_pictures_of_a_style_it_never_saw() -> None:
    pixels, names = fluent()
    scores = likeness(pixels, names)

    better = (scores > scores.diagonal()[:, None]).sum(1)
    assert (better == 0).float().mean() > 0.7
    assert (better < 5).float().mean() > 0.9


@cache
def painted() -> torch.Tensor:
    """A picture of each of `PAINTED` by the base, [N, 3, 128, 128] in [-1, 1]."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(PAINTED))]
    made = pipeline()(
        [f"an emoji of {'an' if name[0] in 'aeiou' else 'a'} {name}" for name in PAINTED],
        height=128,
        width=128,
        num_inference_steps=12,
        guidance_scale=3.0,
        generator=generators,
        output_type="pt",
    ).images
    return made * 2 - 1


def test_what_it_paints_is_named_right_by_its_clip_model() -> None:
    best = likeness(painted(), fluent()[1]).argmax(1)

    assert sum(fluent()[1][i] == name for i, name in zip(best, PAINTED, strict=True)) >= 7


def test_what_it_paints_has_the_colours_of_the_thing_in_another_style() -> None:
    names = list(fluent()[1])
    small, known = (functional.avg_pool2d(x, 8).flatten(1) for x in (painted(), fluent()[0]))
    distances = torch.cdist(small, known)
    own = distances[range(len(PAINTED)), [names.index(name) for name in PAINTED]]
    places = (distances < own[:, None]).sum(1)
    assert (places < 8).sum() >= 7
