"""The FLUX.1 family against the stock pipeline. B batch, L tokens of T5, N of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch

from simpletuner.adapters.lora import attach
from simpletuner.adapters.settings import AdapterSettings
from simpletuner.core.errors import ConfigError
from simpletuner.core.types import Batch, Draw, Place
from simpletuner.diffusion.noise import noise_for
from simpletuner.diffusion.timesteps import quantiles
from simpletuner.models.families.flux import Flux, pack, unpack
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings
from tests.contracts.test_families import Tiny, sampled
from tests.tiny.build import build_flux
from tests.unit.training.builds import CPU, SEEDS, build_stepper, make_batch, window_of

if TYPE_CHECKING:
    from simpletuner.core.types import Embeds

CAPTIONS = ("a photo of a cat in the snow", "", "a dog")
RANDOM = {"flux_guidance_mode": "random-range", "flux_guidance_min": 2.0, "flux_guidance_max": 3.0}
MASKED = {"flux_attention_masked_training": True}


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX.1 that is told no guidance strength; read it only."""
    return build_flux(tmp_path_factory.mktemp("tiny") / "schnell", guided=False)


def open_tiny(folder: Path, **more: Any) -> Flux:
    settings = ModelSettings(model_family="flux", pretrained_model_name_or_path=str(folder), **more)
    return open_family(settings)  # type: ignore[return-value]


def encoded(folder: Path, captions: Sequence[str] = CAPTIONS, **more: Any) -> list[Embeds]:
    family = open_tiny(folder, **more)
    return family.encode_text(family.open_text(CPU), captions)


def answer_of(family: Flux, batch: Batch, **more: Any) -> torch.Tensor:
    count = len(batch.latents)
    t = torch.linspace(100, 900, count)
    draw = Draw(batch.latents, batch.latents, batch.latents, t / 1000, t, torch.ones(count))
    with torch.no_grad():
        return family.predict(family.open_denoiser(CPU), draw, batch, **more)


# --- geometry -------------------------------------------------------------------------------------


def test_latents_are_packed_as_the_stock_pipeline_packs_them() -> None:
    latents = torch.randn(2, 16, 12, 8, generator=torch.Generator().manual_seed(0))
    stock = diffusers.FluxPipeline._pack_latents(latents, 2, 16, 12, 8)
    assert torch.equal(pack(latents), stock)
    assert torch.equal(unpack(stock, 12, 8), latents)
    assert torch.equal(diffusers.FluxPipeline._unpack_latents(stock, 96, 64, 8), latents)


def test_every_token_is_told_its_place(tiny_flux: Path) -> None:
    family = open_tiny(tiny_flux)
    denoiser, batch = family.open_denoiser(CPU), make_batch(1, family_name="flux")
    heard: list[torch.Tensor] = []
    denoiser.pos_embed.register_forward_hook(lambda _m, inputs, _o: heard.append(inputs[0]))
    t = torch.tensor([500.0])
    draw = Draw(batch.latents, batch.latents, batch.latents, t / 1000, t, torch.ones(1))
    family.predict(denoiser, draw, batch)
    stock = diffusers.FluxPipeline._prepare_latent_image_ids(1, 6, 4, CPU.device, CPU.dtype)
    assert torch.equal(heard[0], torch.cat((torch.zeros(512, 3), stock)))
    assert family.tokens(batch.latents) == 6 * 4


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [None, 77])
def test_captions_are_encoded_as_the_stock_pipeline_does(
    tiny_flux: Path, length: int | None
) -> None:
    pipe = diffusers.FluxPipeline.from_pretrained(tiny_flux)
    with torch.no_grad():
        prompt, pooled, _ = pipe.encode_prompt(
            list(CAPTIONS), None, max_sequence_length=length or 512
        )
    ours = encoded(tiny_flux, tokenizer_max_length=length)
    for row, each in enumerate(ours):
        assert torch.equal(each["prompt_embeds"], prompt[row])
        assert torch.equal(each["pooled_prompt_embeds"], pooled[row])
        tokens = len(pipe.tokenizer_2(CAPTIONS[row]).input_ids)
        assert each["prompt_embeds_mask"].tolist() == [i < tokens for i in range(length or 512)]


def test_zero_padding_clears_t5_behind_the_end_of_each_caption(tiny_flux: Path) -> None:
    for plain, cleared in zip(
        encoded(tiny_flux), encoded(tiny_flux, t5_padding="zero"), strict=True
    ):
        own = plain["prompt_embeds_mask"]
        assert torch.equal(cleared["prompt_embeds"][own], plain["prompt_embeds"][own])
        assert not cleared["prompt_embeds"][~own].any()
        assert plain["prompt_embeds"][~own].any()
    prints = {
        open_tiny(tiny_flux, **more).fingerprint("text")
        for more in ({}, {"t5_padding": "zero"}, {"tokenizer_max_length": 77})
    }
    assert len(prints) == 3


# --- guidance -------------------------------------------------------------------------------------


def test_the_guidance_that_is_told_changes_the_answer(tiny_flux: Path) -> None:
    batch = make_batch(1, family_name="flux")
    plain, same, other = (
        answer_of(open_tiny(tiny_flux, **more), batch)
        for more in ({}, {"flux_guidance_value": 1.0}, {"flux_guidance_value": 3.5})
    )
    assert torch.equal(plain, same)
    assert (other - plain).abs().max() > 1e-4


def test_a_random_guidance_is_drawn_for_each_sample_and_does_not_depend_on_the_batch(
    tiny_flux: Path,
) -> None:
    family, batch = open_tiny(tiny_flux, **RANDOM), make_batch(*range(40), family_name="flux")
    drawn = family.drawn(batch.samples, 0, SEEDS)["guidance"]
    assert 2 <= drawn.min() < 2.2 < 2.8 < drawn.max() < 3
    assert torch.equal(family.drawn(batch.samples[5:7], 0, SEEDS)["guidance"], drawn[5:7])
    assert not torch.equal(family.drawn(batch.samples, 1, SEEDS)["guidance"], drawn)
    assert open_tiny(tiny_flux).drawn(batch.samples, 0, SEEDS) == {}


def test_a_step_tells_the_denoiser_the_guidance_of_its_samples(tiny_flux: Path) -> None:
    window = window_of(make_batch(1, 2, family_name="flux"))
    stepper = build_stepper(tiny_flux, family_name="flux", options=RANDOM)
    heard: list[Any] = []
    stepper.weights.trainable.denoiser.register_forward_pre_hook(
        lambda _m, _a, told: heard.append(told["guidance"]), with_kwargs=True
    )
    loss = stepper.step(3, window).loss
    assert torch.equal(heard[0], stepper.family.drawn(window[0][1].samples, 0, SEEDS)["guidance"])
    again = build_stepper(tiny_flux, family_name="flux", options=RANDOM).step(3, window).loss
    plain = build_stepper(tiny_flux, family_name="flux").step(3, window).loss
    assert loss.item() == again.item() != plain.item()


def test_schnell_is_told_none_and_sees_256_tokens(schnell: Path) -> None:
    ours, stock, _ = sampled(Tiny("flux", schnell), steps=4)
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
    assert encoded(schnell)[0]["prompt_embeds"].shape[0] == 256
    assert open_tiny(schnell, **MASKED).step_options == MASKED


@pytest.mark.parametrize("key", ["flux_guidance_value", "flux_guidance_mode"])
def test_a_guidance_for_a_model_that_takes_none_is_refused(schnell: Path, key: str) -> None:
    value = {"flux_guidance_value": 3.5, "flux_guidance_mode": "random-range"}[key]
    with pytest.raises(ConfigError, match=f"{key}: schnell has no use for it"):
        open_tiny(schnell, **{key: value})


# --- the mask -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_training_does_not_see_what_stands_behind_a_caption(
    tiny_flux: Path, dtype: torch.dtype
) -> None:
    batch = make_batch(1, 2, family_name="flux").to(Place(CPU.device, dtype))
    own = batch.embeds["prompt_embeds_mask"]
    assert own.dtype == torch.bool  # type: ignore[union-attr]
    text = batch.embeds["prompt_embeds"]
    changed = torch.where(own[..., None], text, torch.ones_like(text))  # type: ignore[call-overload,index]
    other = Batch(batch.latents, {**batch.embeds, "prompt_embeds": changed}, batch.samples)

    def answer(given: Batch, **more: Any) -> torch.Tensor:
        family = open_tiny(tiny_flux, **more)
        denoiser = family.open_denoiser(Place(CPU.device, dtype))
        t = torch.tensor([500.0, 700.0])
        draw = Draw(given.latents, given.latents, given.latents, t / 1000, t, torch.ones(2))
        with torch.no_grad():
            return family.predict(denoiser, draw, given)

    assert (answer(batch) - answer(other)).abs().max() > 1e-4
    assert torch.equal(answer(batch, **MASKED), answer(other, **MASKED))


def test_masked_gradients_are_the_same_with_checkpointing(tiny_flux: Path) -> None:
    window = window_of(make_batch(1, 2, family_name="flux"))
    found = []
    for checkpointing in (False, True):
        stepper = build_stepper(tiny_flux, family_name="flux", options=MASKED)
        if checkpointing:
            stepper.weights.trainable.denoiser.enable_gradient_checkpointing()
        found.append(stepper.step(0, window).grad_norm.item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_the_stock_pipeline_is_not_given_the_mask(tiny_flux: Path) -> None:
    (embeds,) = encoded(tiny_flux, ["a cat"])
    told = open_tiny(tiny_flux, **MASKED).sampler_arguments(embeds, embeds, 64, 96)
    assert set(told) == {
        *("prompt_embeds", "pooled_prompt_embeds"),
        *("negative_prompt_embeds", "negative_pooled_prompt_embeds"),
        *("width", "height"),
    }


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("auto", [False, True])
def test_the_loss_is_that_of_a_reference_written_with_diffusers_alone(
    tiny_flux: Path, auto: bool
) -> None:
    batch = make_batch(1, 2, 3, family_name="flux")
    settings = {"flow_schedule_auto_shift": auto}
    options = {"flux_guidance_value": 3.5}
    stepper = build_stepper(tiny_flux, diffusion=settings, family_name="flux", options=options)
    ours = stepper.step(4, window_of(batch)).loss

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
        tiny_flux, subfolder="scheduler"
    )
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(
        tiny_flux, subfolder="transformer"
    )
    sigma = torch.distributions.Normal(0.0, 1.0).icdf(quantiles(SEEDS, 4, 3)).sigmoid()
    if auto:
        sigma = scheduler.time_shift(0.5 + 0.65 * (24 - 256) / 3840, 1.0, sigma)
    else:
        sigma = 3 * sigma / (1 + 2 * sigma)
    share = sigma.float().view(-1, 1, 1, 1)
    noise = noise_for(batch.samples, 0, (16, 12, 8), SEEDS)
    noisy = (1 - share) * batch.latents + share * noise
    stock = diffusers.FluxPipeline
    with torch.no_grad():
        answer = transformer(
            stock._pack_latents(noisy, 3, 16, 12, 8),
            timestep=sigma.float(),
            guidance=torch.full((3,), 3.5),
            encoder_hidden_states=batch.embeds["prompt_embeds"],
            pooled_projections=batch.embeds["pooled_prompt_embeds"],
            txt_ids=torch.zeros(512, 3),
            img_ids=stock._prepare_latent_image_ids(3, 6, 4, CPU.device, CPU.dtype),
        ).sample
    answer = stock._unpack_latents(answer, 96, 64, 8)
    reference = torch.nn.functional.mse_loss(answer, noise - batch.latents)
    assert ours.item() == pytest.approx(reference.item(), rel=1e-5)


def test_each_named_choice_of_modules_is_another_one(tiny_flux: Path) -> None:
    config = diffusers.FluxTransformer2DModel.load_config(tiny_flux, subfolder="transformer")
    family, found = open_tiny(tiny_flux), {}
    for name in family.lora_target_sets:
        with torch.device("meta"):
            denoiser = diffusers.FluxTransformer2DModel.from_config(
                {**config, "num_layers": 1, "num_single_layers": 21}
            )
            lora = attach(denoiser, family, AdapterSettings(lora_rank=4, flux_lora_target=name))
        found[name] = set(lora.layers())
        for module in found[name]:
            assert family.original.place(module) is not None, module
    counts = {name: len(modules) for name, modules in found.items()}
    assert counts == {
        "all": 8 + 21 * 3,
        "mmdit": 8 + 21 * 3,
        "context": 4,
        "context+ffs": 4 + 2,
        "all+ffs": 8 + 4 + 21 * 5 + 1,
        "all+ffs+embedder": 8 + 4 + 21 * 5 + 1 + 1,
        "ai-toolkit": 8 + 4 + 2 + 21 * 6 + 1,
        "tiny": 2,
        "nano": 1,
    }
    assert found["nano"] == {"single_transformer_blocks.7.proj_out"}
    assert found["tiny"] - found["nano"] == {"single_transformer_blocks.20.proj_out"}


def test_a_choice_that_the_model_has_no_modules_for_is_refused(tiny_flux: Path) -> None:
    with pytest.raises(ConfigError, match=r"no module .* 'single_transformer_blocks\.7\.proj_out'"):
        build_stepper(tiny_flux, family_name="flux", adapter={"flux_lora_target": "nano"})


def test_mixed_precision_learns(tiny_flux: Path) -> None:
    place = Place(torch.device("cpu"), torch.bfloat16)
    stepper = build_stepper(
        tiny_flux, place, torch.bfloat16, learning_rate=1e-2, family_name="flux", options=MASKED
    )
    window = window_of(make_batch(1, 2, family_name="flux"))
    losses = [stepper.step(0, window).loss.item() for _ in range(12)]
    assert losses[-1] < losses[0] - 0.005


def test_flavours_are_named_as_people_name_them() -> None:
    assert tuple(Flux.flavours) == ("krea", "dev", "schnell", "fluxbooru")
