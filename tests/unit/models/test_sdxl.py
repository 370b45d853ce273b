"""The SDXL family against the stock pipeline. L tokens, D width, H W in px."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import pytest
import torch

from simpletuner.cache.truncation import Cut, cut_captions
from simpletuner.core.errors import ConfigError
from simpletuner.core.types import Batch, Draw, Geometry, Place, Sample
from simpletuner.diffusion.objective import objective_of
from simpletuner.models.family import Family
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings
from tests.tiny.build import build_sdxl

if TYPE_CHECKING:
    from simpletuner.core.types import Embeds

CPU = Place(torch.device("cpu"), torch.float32)


def open_tiny(folder: Path, **more: object) -> Family:
    return open_family(
        ModelSettings(model_family="sdxl", pretrained_model_name_or_path=str(folder), **more)
    )


def stack(embeds: Sequence[Embeds]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([each[name] for each in embeds]) for name in embeds[0]}


def sample(width: int, height: int) -> Sample:
    whole = Geometry((width, height), (width, height), (0, 0, width, height))
    return Sample("0" * 32, "set", "a.png", "a cat", whole)


def test_predict_in_a_ddim_loop_gives_the_stock_pipelines_latents(tiny_sdxl: Path) -> None:
    family = open_tiny(tiny_sdxl)
    embeds = stack(family.encode_text(family.open_text(CPU), ["a photo of a cat"]))
    scheduler = diffusers.DDIMScheduler.from_config(
        family.checkpoint.scheduler_config, clip_sample=False, set_alpha_to_one=False
    )
    start = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(3))
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(
        prompt="a photo of a cat",
        width=64,
        height=96,
        guidance_scale=1.0,
        num_inference_steps=12,
        latents=start.clone(),
        output_type="latent",
    ).images

    unet = family.open_denoiser(CPU)
    scheduler.set_timesteps(12)
    latents = start.clone()
    zeros = torch.zeros(1)
    for t in scheduler.timesteps:
        draw = Draw(latents, latents, latents, zeros, t.float().expand(1), torch.ones(1))
        with torch.no_grad():
            answer = family.predict(unet, draw, Batch(latents, embeds, (sample(64, 96),)))
        latents = scheduler.step(answer, t, latents).prev_sample
    assert torch.allclose(latents, stock, atol=1e-5, rtol=1e-5)


def test_captions_are_encoded_as_the_stock_pipeline_does(tiny_sdxl: Path) -> None:
    family = open_tiny(tiny_sdxl)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    prompt, _, pooled, _ = pipe.encode_prompt("a dog", do_classifier_free_guidance=False)
    (ours,) = family.encode_text(family.open_text(CPU), ["a dog"])
    assert torch.equal(ours["prompt_embeds"], prompt[0])
    assert torch.equal(ours["pooled_prompt_embeds"], pooled[0])


def test_latents_are_scaled_and_do_not_depend_on_their_batch(tiny_sdxl: Path) -> None:
    family = open_tiny(tiny_sdxl)
    vae = family.open_vae(CPU.device, torch.float32)
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def seeded() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(2)]

    both = family.encode_pixels(vae, pixels, seeded())
    second = family.encode_pixels(vae, pixels[1:], seeded()[1:])
    reference = vae.encode(pixels[1:]).latent_dist.sample(torch.Generator().manual_seed(1))
    assert both.shape == (2, 4, 8, 12)
    assert both.dtype == torch.float32
    assert torch.allclose(both[1:], second, atol=1e-6)
    assert torch.allclose(second, reference * vae.config.scaling_factor, atol=1e-6)
    decoded = vae.decode(second / vae.config.scaling_factor).sample
    assert torch.allclose(family.decode_latents(vae, second), decoded, atol=1e-5)


def test_size_conditioning_is_that_of_the_file_the_crop_and_the_target(tiny_sdxl: Path) -> None:
    family = open_tiny(tiny_sdxl)
    unet = family.open_denoiser(CPU)
    heard: list[torch.Tensor] = []
    unet.add_time_proj.register_forward_hook(lambda _m, inputs, _o: heard.append(inputs[0]))
    geometry = Geometry(source=(1001, 667), resize=(96, 64), crop=(16, 0, 64, 64))
    latents = torch.zeros(1, 4, 8, 8)
    embeds = {"prompt_embeds": torch.zeros(1, 77, 64), "pooled_prompt_embeds": torch.zeros(1, 32)}
    draw = Draw(latents, latents, latents, torch.zeros(1), torch.ones(1), torch.ones(1))
    family.predict(unet, draw, Batch(latents, embeds, (Sample("", "", "", "", geometry),)))
    assert heard[0].tolist() == [667, 1001, 0, 16, 64, 64]
    assert heard[0].dtype == torch.float32


def test_a_refiner_hears_the_aesthetic_score_and_renders(tmp_path: Path) -> None:
    folder = build_sdxl(tmp_path / "refiner", refiner=True)
    family = open_tiny(folder, data_aesthetic_score=6.5)
    embeds = stack(family.encode_text(family.open_text(CPU), ["a cat", ""]))
    unet = family.open_denoiser(CPU)
    heard: list[torch.Tensor] = []
    unet.add_time_proj.register_forward_hook(lambda _m, inputs, _o: heard.append(inputs[0]))
    latents = torch.zeros(2, 4, 8, 8)
    draw = Draw(latents, latents, latents, torch.zeros(2), torch.ones(2), torch.ones(2))
    family.predict(unet, draw, Batch(latents, embeds, (sample(64, 64),) * 2))
    assert heard[0].view(2, 5)[0].tolist() == [64, 64, 0, 0, 6.5]

    pipe = family.open_sampler(unet, family.open_vae(CPU.device, torch.float32))
    pipe.set_progress_bar_config(disable=True)
    first, second = ({name: value[i : i + 1] for name, value in embeds.items()} for i in (0, 1))
    with torch.no_grad():
        image = pipe(
            **family.sampler_arguments(first, second, 96, 64),
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
    assert image.size == (96, 64)
    assert heard[-1].view(-1, 5)[-1][4] == 6.5


def test_a_prediction_type_the_user_sets_reaches_the_sampler(tiny_sdxl: Path) -> None:
    family = open_tiny(tiny_sdxl, prediction_type="v_prediction")
    unet, vae = family.open_denoiser(CPU), family.open_vae(CPU.device, torch.float32)
    assert family.open_sampler(unet, vae).scheduler.config.prediction_type == "v_prediction"
    plain = open_tiny(tiny_sdxl)
    assert plain.open_sampler(unet, vae).scheduler.config.prediction_type == "epsilon"


def test_zero_terminal_snr_reaches_training_and_the_sampler(
    tiny_sdxl: Path, tiny_sdxl_v: Path
) -> None:
    family = open_tiny(tiny_sdxl_v, rescale_betas_zero_snr=True)
    unet, vae = family.open_denoiser(CPU), family.open_vae(CPU.device, torch.float32)
    latents, noise = torch.ones(1, 4, 4, 4), torch.full((1, 4, 4, 4), 2.0)

    objective = objective_of(family.prediction_type, family.scheduler_config)
    draw = objective.draw(latents, torch.tensor([999]), noise)
    scheduler = family.open_sampler(unet, vae).scheduler
    scheduler.set_timesteps(4)

    assert torch.equal(draw.noisy, noise)
    assert torch.equal(draw.target, -latents)
    assert scheduler.timesteps[0] == 999
    assert scheduler.sigmas[0] > 1000  # as good as nothing but noise
    assert scheduler.config.rescale_betas_zero_snr
    with pytest.raises(ConfigError, match="predicts the noise, which says nothing"):
        open_tiny(tiny_sdxl, rescale_betas_zero_snr=True)


def test_captions_that_are_longer_than_the_encoders_see_are_found(tiny_sdxl: Path) -> None:
    family = open_tiny(tiny_sdxl)
    tokenizers = family.open_tokenizers()
    seen, cut = " ".join(["a"] * 75), " ".join(["a"] * 76)  # and the two special tokens
    assert cut_captions(family, tokenizers, [seen, ""]) == []
    (found,) = cut_captions(family, tokenizers, [seen, cut, ""])
    assert found == Cut(("text_encoder", "text_encoder_2"), 77, 1, cut, 78, lost=True)
    assert found.told("dataset cats", 3) == (
        "dataset cats: 1 of 3 captions are longer than the 77 tokens text_encoder and"
        f" text_encoder_2 see; what comes after is not learned; the longest has 78: {cut[:60]}…"
    )


def test_captions_are_measured_without_weights(tiny_sdxl: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_sdxl, bare)
    for weights in bare.rglob("text_encoder*/*.safetensors"):
        weights.unlink()
    family = open_tiny(bare)
    assert cut_captions(family, family.open_tokenizers(), ["a " * 90])[0].tokens == 92
