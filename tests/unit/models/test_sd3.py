"""The SD3 family against the stock pipeline. L tokens, N tokens of T5, D width, H W in px."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch

from simpletuner.cache.store import TensorStore
from simpletuner.cache.text import TextCache
from simpletuner.cache.truncation import cut_captions
from simpletuner.core.errors import ModelError
from simpletuner.core.events import Bus
from simpletuner.core.types import Batch, Draw, Place
from simpletuner.diffusion.noise import noise_for
from simpletuner.diffusion.timesteps import quantiles
from simpletuner.models.family import Family
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings
from tests.unit.training.builds import SEEDS, build_stepper, make_batch, window_of

if TYPE_CHECKING:
    from simpletuner.core.types import Embeds

CPU = Place(torch.device("cpu"), torch.float32)
CAPTIONS = ("a photo of a cat in the snow", "", "a dog")
LONG = "a photo of a cat in the snow " * 30


def open_tiny(folder: Path, **more: Any) -> Family:
    return open_family(
        ModelSettings(model_family="sd3", pretrained_model_name_or_path=str(folder), **more)
    )


def encoded(folder: Path, captions: Sequence[str] = CAPTIONS, **more: Any) -> list[Embeds]:
    family = open_tiny(folder, **more)
    return family.encode_text(family.open_text(CPU), captions)


def stock_pipeline(folder: Path) -> Any:
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stack(embeds: Sequence[Embeds]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([each[name] for each in embeds]) for name in embeds[0]}


def test_predict_in_a_flow_euler_loop_gives_the_stock_pipelines_latents(tiny_sd3: Path) -> None:
    family = open_tiny(tiny_sd3)
    embeds = stack(family.encode_text(family.open_text(CPU), CAPTIONS[:1]))
    start = torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(3))
    stock = stock_pipeline(tiny_sd3)(
        prompt=CAPTIONS[0],
        width=64,
        height=96,
        guidance_scale=1.0,
        num_inference_steps=12,
        max_sequence_length=154,
        latents=start.clone(),
        output_type="latent",
    ).images

    transformer, scheduler = family.open_denoiser(CPU), family.scheduler()
    scheduler.set_timesteps(12)
    latents = start.clone()
    zeros = torch.zeros(1)
    for t in scheduler.timesteps:
        draw = Draw(latents, latents, latents, zeros, t.expand(1), torch.ones(1))
        with torch.no_grad():
            answer = family.predict(transformer, draw, Batch(latents, embeds, ()))
        latents = scheduler.step(answer, t, latents).prev_sample
    assert torch.allclose(latents, stock, atol=1e-5, rtol=1e-5)
    assert (stock - start).abs().max() > 0.1


@pytest.mark.parametrize("length", [None, 77])
def test_captions_are_encoded_as_the_stock_pipeline_does(
    tiny_sd3: Path, length: int | None
) -> None:
    captions = [*CAPTIONS, LONG]
    with torch.no_grad():
        prompt, _, pooled, _ = stock_pipeline(tiny_sd3).encode_prompt(
            captions,
            None,
            None,
            max_sequence_length=length or 154,
            do_classifier_free_guidance=False,
        )
    ours = stack(encoded(tiny_sd3, captions, tokenizer_max_length=length))
    assert prompt.shape == (4, 77 + (length or 154), 64)
    assert torch.equal(ours["prompt_embeds"], prompt)
    assert torch.equal(ours["pooled_prompt_embeds"], pooled)


def test_zero_padding_clears_t5_behind_the_end_of_each_caption_and_nothing_else(
    tiny_sd3: Path,
) -> None:
    captions = [*CAPTIONS, LONG]
    plain, cleared = encoded(tiny_sd3, captions), encoded(tiny_sd3, captions, t5_padding="zero")
    tokenizer = stock_pipeline(tiny_sd3).tokenizer_3
    lengths = [min(len(tokenizer(caption).input_ids), 154) for caption in captions]
    assert lengths[1] == 1
    assert lengths[3] == 154
    for before, after, length in zip(plain, cleared, lengths, strict=True):
        end = 77 + length
        assert torch.equal(after["prompt_embeds"][:end], before["prompt_embeds"][:end])
        assert not after["prompt_embeds"][end:].any()
        assert before["prompt_embeds"][end:].abs().sum() > 0 or length == 154
        assert torch.equal(after["pooled_prompt_embeds"], before["pooled_prompt_embeds"])


@pytest.mark.parametrize(
    ("options", "clip_is_zero", "t5_is_zero"),
    [
        ({}, False, False),
        ({"sd3_clip_uncond_behaviour": "zero"}, True, True),
        (
            {"sd3_clip_uncond_behaviour": "zero", "sd3_t5_uncond_behaviour": "empty_string"},
            True,
            False,
        ),
        ({"sd3_t5_uncond_behaviour": "zero"}, False, True),
    ],
)
def test_a_dropped_caption_becomes_what_was_asked_of_each_encoder(
    tiny_sd3: Path, options: dict[str, str], clip_is_zero: bool, t5_is_zero: bool
) -> None:
    cat, dropped, _ = encoded(tiny_sd3, **options)
    plain_cat, plain_dropped, _ = encoded(tiny_sd3)
    for name, value in plain_cat.items():
        assert torch.equal(cat[name], value)
    for part, zero, name in (
        (slice(None, 77), clip_is_zero, "prompt_embeds"),
        (slice(77, None), t5_is_zero, "prompt_embeds"),
        (slice(None), clip_is_zero, "pooled_prompt_embeds"),
    ):
        found, before = dropped[name][part], plain_dropped[name][part]
        assert before.any()
        assert torch.equal(found, torch.zeros_like(before) if zero else before)


@pytest.mark.parametrize(
    "options",
    [
        {"tokenizer_max_length": 77},
        {"t5_padding": "zero"},
        {"sd3_clip_uncond_behaviour": "zero"},
        {"sd3_t5_uncond_behaviour": "zero"},
    ],
)
def test_an_option_of_the_text_encodes_captions_anew(
    tiny_sd3: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    def cache(**chosen: Any) -> TextCache:
        return TextCache(open_tiny(tiny_sd3, **chosen), TensorStore.open(tmp_path), CPU)

    cache().prepare({"set": CAPTIONS}, Bus())
    store = TensorStore.open(tmp_path)
    entries = len(store)
    cache(**options).prepare({"set": CAPTIONS}, Bus())
    assert len(TensorStore.open(tmp_path)) == 2 * entries
    found, plain = cache(**options).embeds(CAPTIONS), cache().embeds(CAPTIONS)
    assert not torch.equal(found["prompt_embeds"][1, -1], plain["prompt_embeds"][1, -1]) or (
        found["prompt_embeds"].shape != plain["prompt_embeds"].shape
    )


def test_options_that_say_the_same_share_their_entries(tiny_sd3: Path) -> None:
    plain = open_tiny(tiny_sd3).fingerprint("text")
    spelled = {"tokenizer_max_length": 154, "sd3_t5_uncond_behaviour": "empty_string"}
    assert open_tiny(tiny_sd3, **spelled).fingerprint("text") == plain
    assert open_tiny(tiny_sd3, t5_padding="zero").fingerprint("vae") == (
        open_tiny(tiny_sd3).fingerprint("vae")
    )


def test_latents_are_shifted_and_scaled_as_the_stock_pipeline_expects(tiny_sd3: Path) -> None:
    family = open_tiny(tiny_sd3)
    vae = family.open_vae(CPU.device, torch.float32)
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_pixels(vae, pixels, [torch.Generator().manual_seed(1)])
    reference = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(1))
    assert latents.shape == (1, 16, 8, 12)
    assert torch.allclose(latents, (reference - 0.0609) * 1.5305, atol=1e-5)
    decoded = vae.decode(latents / 1.5305 + 0.0609).sample
    assert torch.allclose(family.decode_latents(vae, latents), decoded, atol=1e-5)


def test_tokens_are_counted_by_the_checkpoints_own_patch(tiny_sd3: Path, tmp_path: Path) -> None:
    latents = torch.zeros(2, 16, 12, 8)
    assert open_tiny(tiny_sd3).tokens(latents) == 6 * 4
    folder = shutil.copytree(tiny_sd3, tmp_path / "sd3")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "patch_size": 4}))
    assert open_tiny(folder).tokens(latents) == 3 * 2


def test_the_timestep_reaches_the_model_unrounded_in_a_bf16_run(tiny_sd3: Path) -> None:
    family = open_tiny(tiny_sd3)
    transformer = family.open_denoiser(Place(torch.device("cpu"), torch.bfloat16))
    heard: list[torch.Tensor] = []
    embed = transformer.time_text_embed.time_proj
    embed.register_forward_hook(lambda _m, inputs, _o: heard.append(inputs[0]))
    batch = make_batch(1, family_name="sd3").to(Place(CPU.device, torch.bfloat16))
    t = torch.tensor([997.6])
    draw = Draw(batch.latents, batch.latents, batch.latents, t / 1000, t, torch.ones(1))
    answer = family.predict(transformer, draw, batch)
    assert torch.equal(heard[0], t)
    assert answer.dtype == torch.float32


def test_captions_of_different_lengths_predict_in_one_batch_what_they_do_alone(
    tiny_sd3: Path,
) -> None:
    family = open_tiny(tiny_sd3)
    embeds = encoded(tiny_sd3, [*CAPTIONS, LONG])
    transformer = family.open_denoiser(CPU)
    noisy = torch.randn(4, 16, 12, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10.5, 300.0, 700.0, 999.0])

    def predict(rows: list[int]) -> torch.Tensor:
        latents = noisy[rows]
        draw = Draw(latents, latents, latents, t[rows] / 1000, t[rows], torch.ones(len(rows)))
        chosen = stack([embeds[row] for row in rows])
        with torch.no_grad():
            return family.predict(transformer, draw, Batch(latents, chosen, ()))

    together = predict([0, 1, 2, 3])
    for row in range(4):
        torch.testing.assert_close(together[row], predict([row])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("auto", [False, True])
def test_the_loss_is_that_of_a_reference_written_with_diffusers_alone(
    tiny_sd3: Path, auto: bool
) -> None:
    batch = make_batch(1, 2, 3, family_name="sd3")
    settings = {"flow_schedule_auto_shift": auto}
    stepper = build_stepper(tiny_sd3, diffusion=settings, family_name="sd3")
    ours = stepper.step(4, window_of(batch)).loss

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
        tiny_sd3, subfolder="scheduler"
    )
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(tiny_sd3, subfolder="transformer")
    normal = torch.distributions.Normal(0.0, 1.0).icdf(quantiles(SEEDS, 4, 3))
    if auto:
        sigma = scheduler.time_shift(0.5 + 0.65 * (24 - 256) / 3840, 1.0, normal.sigmoid())
    else:
        sigma = scheduler.config.shift * normal.sigmoid()
        sigma = sigma / (1 + (scheduler.config.shift - 1) * normal.sigmoid())
    share = sigma.float().view(-1, 1, 1, 1)
    noise = noise_for(batch.samples, 0, (16, 12, 8), SEEDS)
    with torch.no_grad():
        answer = transformer(
            (1 - share) * batch.latents + share * noise,
            timestep=sigma.float() * 1000,
            encoder_hidden_states=batch.embeds["prompt_embeds"],
            pooled_projections=batch.embeds["pooled_prompt_embeds"],
        ).sample
    reference = torch.nn.functional.mse_loss(answer, noise - batch.latents)
    assert ours.item() == pytest.approx(reference.item(), rel=1e-5)


def test_flow_settings_reach_the_step(tiny_sd3: Path) -> None:
    window = window_of(make_batch(1, 2, family_name="sd3"))

    def told(**diffusion: Any) -> torch.Tensor:
        stepper = build_stepper(tiny_sd3, diffusion=diffusion, family_name="sd3")
        return stepper.draw(0, 0, *window[0])[1].timestep

    chosen: list[dict[str, Any]] = [
        {},
        {"flow_schedule_shift": 1},
        {"flow_schedule_auto_shift": True},
        {"flow_use_uniform_schedule": True},
        {"flow_sigmoid_scale": 2.0},
    ]
    assert len({tuple(told(**each).tolist()) for each in chosen}) == len(chosen)


def test_mixed_precision_learns(tiny_sd3: Path) -> None:
    place = Place(torch.device("cpu"), torch.bfloat16)
    stepper = build_stepper(tiny_sd3, place, torch.bfloat16, learning_rate=1e-2, family_name="sd3")
    window = window_of(make_batch(1, 2, family_name="sd3"))
    losses = [stepper.step(0, window).loss.item() for _ in range(12)]
    assert losses[-1] < losses[0] - 0.005
    assert {p.dtype for p in stepper.weights.trainable.parameters().values()} == {torch.float32}


def test_the_sampler_keeps_the_checkpoints_own_scheduler(tiny_sd3: Path) -> None:
    family = open_tiny(tiny_sd3)
    pipe = family.open_sampler(family.open_denoiser(CPU), family.open_vae(CPU.device, CPU.dtype))
    assert type(pipe).__name__ == "StableDiffusion3Pipeline"
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert pipe.scheduler.config.shift == 3.0


def test_a_checkpoint_without_t5_is_named(tiny_sd3: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd3, tmp_path / "no-t5")
    path = folder / "model_index.json"
    index = {**json.loads(path.read_text()), "text_encoder_3": [None, None]}
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match="no-t5 has no T5"):
        open_tiny(folder).open_text(CPU)


def test_flavours_are_named_as_people_name_them() -> None:
    from simpletuner.models.families import FAMILIES

    assert FAMILIES["sd3"].fact("flavours") == ("medium", "large", "medium-3.0")


def test_a_caption_that_only_t5_sees_whole_is_not_lost(tiny_sd3: Path) -> None:
    caption = " ".join(["a"] * 100)

    def cut(**options: Any) -> list[tuple[tuple[str, ...], int, bool]]:
        family = open_tiny(tiny_sd3, **options)
        found = cut_captions(family, family.open_tokenizers(), [caption, "a cat"])
        return [(each.encoders, each.window, each.lost) for each in found]

    clips = ("text_encoder", "text_encoder_2")
    assert cut() == [(clips, 77, False)]
    assert cut(tokenizer_max_length=90)[1:] == [(("text_encoder_3",), 90, True)]
