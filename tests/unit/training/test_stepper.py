"""One optimizer step against diffusers and against closed forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel

from simpletuner.core.types import Place
from simpletuner.diffusion.noise import noise_for
from simpletuner.diffusion.timesteps import quantiles
from tests.unit.training.builds import SEEDS, build_stepper, gradients_of, make_batch, window_of


def test_the_loss_is_that_of_a_reference_written_with_diffusers_alone(
    tiny_sdxl: Path, tiny_sdxl_v: Path
) -> None:
    for folder, kind in ((tiny_sdxl, "epsilon"), (tiny_sdxl_v, "v_prediction")):
        batch = make_batch(1, 2, 3)
        ours = build_stepper(folder).step(4, window_of(batch)).loss

        scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        t = (quantiles(SEEDS, 4, 3) * 1000).long()
        noise = noise_for(batch.samples, 0, (4, 12, 8), SEEDS)
        noisy = scheduler.add_noise(batch.latents, noise, t)
        target = noise
        if kind == "v_prediction":
            target = scheduler.get_velocity(batch.latents, noise, t)
        sizes = torch.tensor([[96.0, 64.0, 0.0, 0.0, 96.0, 64.0]] * 3)
        with torch.no_grad():
            answer = unet(
                noisy,
                t,
                encoder_hidden_states=batch.embeds["prompt_embeds"],
                added_cond_kwargs={
                    "text_embeds": batch.embeds["pooled_prompt_embeds"],
                    "time_ids": sizes,
                },
            ).sample
        reference = torch.nn.functional.mse_loss(answer, target)
        assert ours.item() == pytest.approx(reference.item(), rel=1e-5)


def test_a_rollout_trains_on_what_the_model_made_of_a_noisier_start(tiny_sdxl: Path) -> None:
    """A loop of diffusers alone: noised further back, DDIM down to the timestep, then the loss."""
    batch, most = make_batch(1, 2, 3), 6
    diffusion = {
        "scheduled_sampling_max_step_offset": most,
        "scheduled_sampling_probability": 1.0,
        "scheduled_sampling_sampler": "euler",
    }
    stepper = build_stepper(tiny_sdxl, diffusion=diffusion)
    t = (quantiles(SEEDS, 4, 3) * 1000).long()
    lengths = stepper.rollout.lengths(batch.samples, 0, 4, t)
    assert lengths.unique().numel() > 1
    ours = stepper.step(4, window_of(batch)).loss

    scheduler = DDIMScheduler.from_pretrained(
        tiny_sdxl, subfolder="scheduler", clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(1000)
    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet")
    noise = noise_for(batch.samples, 0, (4, 12, 8), SEEDS)
    losses = []
    for row, (at, length) in enumerate(zip(t.tolist(), lengths.tolist(), strict=True)):
        told = {
            "encoder_hidden_states": batch.embeds["prompt_embeds"][row : row + 1],
            "added_cond_kwargs": {
                "text_embeds": batch.embeds["pooled_prompt_embeds"][row : row + 1],
                "time_ids": torch.tensor([[96.0, 64.0, 0.0, 0.0, 96.0, 64.0]]),
            },
        }
        clean = batch.latents[row : row + 1]
        with torch.no_grad():
            start = torch.tensor([at + length])
            x = scheduler.add_noise(clean, noise[row : row + 1], start)
            for now in range(at + length, at, -1):
                x = scheduler.step(unet(x, now, **told).sample, now, x).prev_sample
            abar = scheduler.alphas_cumprod[at]
            target = (x - abar.sqrt() * clean) / (1 - abar).sqrt()  # x0 stays the answer
            losses.append((unet(x, at, **told).sample - target).square().mean())
    assert ours.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_unequal_batches_of_a_window_give_the_gradient_of_their_exact_mean(
    tiny_sdxl: Path,
) -> None:
    stepper = build_stepper(tiny_sdxl)
    together = gradients_of(stepper, window_of(make_batch(1, 2, 3)))
    apart = gradients_of(stepper, window_of(make_batch(1, 2), make_batch(3)))
    for name, gradient in together.items():
        assert torch.allclose(gradient, apart[name], atol=1e-6, rtol=1e-4), name


def test_a_ghost_sample_weighs_nothing(tiny_sdxl: Path) -> None:
    stepper = build_stepper(tiny_sdxl)
    ((planned, batch),) = window_of(make_batch(1))
    ghost = planned.__class__(
        source=0,
        rows=(0, 0),
        occurrences=(0, 0),
        weights=(1.0, 0.0),
        positions=(0, 0),
        window_samples=1,
        epoch=0,
    )
    alone = gradients_of(stepper, [(planned, batch)])
    haunted = gradients_of(stepper, [(ghost, make_batch(1, 1))])
    for name, gradient in alone.items():
        assert torch.allclose(gradient, haunted[name], atol=1e-6, rtol=1e-4), name


def test_gradients_are_clipped_by_their_global_norm(tiny_sdxl: Path) -> None:
    window = window_of(make_batch(1, 2))
    free = build_stepper(tiny_sdxl, max_grad_norm=0)
    norm = torch.cat([g.flatten() for g in gradients_of(free, window).values()]).norm()
    bound = build_stepper(tiny_sdxl, max_grad_norm=norm.item() / 10)
    outcome = bound.step(0, window)
    assert outcome.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    left = [p.grad.flatten() for p in bound.weights.trainable.parameters().values()]
    assert torch.cat(left).norm().item() == pytest.approx(norm.item() / 10, rel=1e-4)


def test_gradients_are_clipped_by_value(tiny_sdxl: Path) -> None:
    stepper = build_stepper(tiny_sdxl, max_grad_norm=1e-6, grad_clip_method="value")
    stepper.step(0, window_of(make_batch(1, 2)))
    parameters = stepper.weights.trainable.parameters().values()
    assert max(p.grad.abs().max().item() for p in parameters) == pytest.approx(1e-6)


def test_dropout_is_a_function_of_the_step_alone(tiny_sdxl: Path) -> None:
    window = window_of(make_batch(1, 2))
    stepper = build_stepper(tiny_sdxl, adapter={"lora_dropout": 0.5})
    for parameter in stepper.weights.trainable.parameters().values():
        torch.nn.init.constant_(parameter, 0.05)

    def loss(step: int) -> float:
        return stepper.micro_loss(step, 0, *window[0]).item()

    first = loss(0)
    torch.manual_seed(999)
    assert loss(0) == first
    assert loss(1) != first


def test_mixed_precision_learns_and_keeps_the_adapters_fp32(tiny_sdxl: Path) -> None:
    place = Place(torch.device("cpu"), torch.bfloat16)
    stepper = build_stepper(tiny_sdxl, place, torch.bfloat16, learning_rate=1e-2)
    window = window_of(make_batch(1, 2))
    losses = [stepper.step(0, window).loss.item() for _ in range(12)]
    assert losses[-1] < losses[0] - 0.01
    parameters = stepper.weights.trainable.parameters().values()
    assert {p.dtype for p in parameters} == {torch.float32}


def test_regularisation_costs_nothing_until_the_adapters_say_something(tiny_sdxl: Path) -> None:
    kept, learned = window_of(make_batch(1, 2, regularises=True)), window_of(make_batch(1, 2))
    stepper = build_stepper(tiny_sdxl, adapter={"lora_dropout": 0.5}, learning_rate=1e-2)
    assert all(not g.any() for g in gradients_of(stepper, kept).values())
    assert stepper.step(0, kept).loss.item() == 0
    assert stepper.step(1, learned).loss.item() > 0
    assert stepper.micro_loss(2, 0, *kept[0]).item() > 0


@pytest.mark.parametrize(("folder", "family"), [("tiny_sdxl", "sdxl"), ("tiny_sd3", "sd3")])
def test_regularisation_holds_the_prediction_near_that_of_the_base(
    folder: str, family: str, request: pytest.FixtureRequest
) -> None:
    """Its loss is the distance from the base's prediction, at the same noise and timestep."""

    def distance(regularises: bool) -> float:
        stepper = build_stepper(
            request.getfixturevalue(folder), learning_rate=1e-2, family_name=family
        )
        subject = make_batch(1, 2, family_name=family)
        beside = make_batch(3, 4, family_name=family, regularises=regularises)
        for step in range(12):
            stepper.step(step, window_of(subject, beside))
        batch, draw = stepper.draw(99, 0, *window_of(beside)[0])
        trainable = stepper.weights.trainable
        with torch.no_grad():
            ours = trainable.predict(stepper.family, draw, batch)
            with trainable.disabled():
                base = trainable.predict(stepper.family, draw, batch)
        far = torch.nn.functional.mse_loss(ours, base).item()
        if regularises:
            told = stepper.micro_loss(99, 0, *window_of(beside)[0]).item()
            assert told == pytest.approx(far, rel=1e-5)
        return far

    assert 0 < distance(regularises=True) < distance(regularises=False) / 2


def test_nothing_is_learned_where_the_mask_is_black(tiny_sdxl: Path) -> None:
    stepper, batch = build_stepper(tiny_sdxl), make_batch(1, 2)
    mask = torch.zeros(2, 1, 12, 8)
    black = gradients_of(stepper, window_of(replace(batch, mask=mask)))
    assert all(not g.any() for g in black.values())

    mask[0, :, :6] = 1
    ((planned, masked),) = window_of(replace(batch, mask=mask))
    batch, draw = stepper.draw(0, 0, planned, masked)
    with torch.no_grad():
        error = stepper.weights.trainable.predict(stepper.family, draw, batch) - draw.target
    expected = error[0, :, :6].square().sum() / error.numel()
    assert stepper.micro_loss(0, 0, planned, masked).item() == pytest.approx(expected.item())


def test_gradient_checkpointing_changes_no_gradient(tiny_sdxl: Path) -> None:
    window = window_of(make_batch(1, 2))
    stepper = build_stepper(tiny_sdxl, adapter={"lora_dropout": 0.1})
    plain = gradients_of(stepper, window)
    stepper.weights.trainable.denoiser.enable_gradient_checkpointing()
    again = gradients_of(stepper, window)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
