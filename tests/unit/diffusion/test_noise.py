"""Noise belongs to a draw of a sample, never to its batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from simpletuner.core.seeds import Seeds
from simpletuner.core.types import Geometry, Sample
from simpletuner.diffusion.noise import Noises, noise_for
from simpletuner.diffusion.settings import DiffusionSettings

SHAPE = (4, 8, 6)
SEEDS = Seeds(42)


def sample(name: str) -> Sample:
    geometry = Geometry(source=(64, 48), resize=(64, 48), crop=(0, 0, 64, 48))
    return Sample(name, "photos", f"{name}.png", "a photo", geometry)


def test_noise_of_a_sample_does_not_depend_on_who_shares_its_batch() -> None:
    a, b, c = (sample(name) for name in "abc")

    alone = noise_for([b], 0, SHAPE, SEEDS)
    together = noise_for([a, b, c], 0, SHAPE, SEEDS)

    assert together.shape == (3, *SHAPE)
    assert torch.equal(alone[0], together[1])


def test_noise_changes_with_epoch_occurrence_sample_dataset_and_seed() -> None:
    one = sample("a")
    draws = [
        noise_for([one], 0, SHAPE, SEEDS),
        noise_for([one], 1, SHAPE, SEEDS),
        noise_for([replace(one, occurrence=1)], 0, SHAPE, SEEDS),
        noise_for([replace(one, id="b")], 0, SHAPE, SEEDS),
        noise_for([replace(one, dataset="drawings")], 0, SHAPE, SEEDS),
        noise_for([one], 0, SHAPE, Seeds(43)),
    ]

    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


def test_noise_does_not_depend_on_caption_path_or_torch_s_global_generator() -> None:
    one = sample("a")
    first = noise_for([one], 0, SHAPE, SEEDS)
    torch.manual_seed(5)
    state = torch.get_rng_state()

    again = noise_for([replace(one, caption="", path="renamed.png")], 0, SHAPE, SEEDS)

    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())


def test_noise_is_standard_normal_and_fp32() -> None:
    noise = noise_for([sample(str(i)) for i in range(50)], 0, (4, 32, 32), SEEDS)

    assert noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    assert abs(float((noise**4).mean()) - 3) < 0.1


# ---- offsets and perturbations


def noises(**settings: object) -> Noises:
    return Noises(DiffusionSettings(**settings), SEEDS)  # type: ignore[arg-type]


def test_without_either_the_noise_is_the_plain_one() -> None:
    samples = [sample(name) for name in "abc"]
    noise, perturbed = noises().draw(samples, 0, SHAPE, 3)
    assert torch.equal(noise, noise_for(samples, 0, SHAPE, SEEDS))
    assert perturbed is None


def test_an_offset_shifts_whole_channels_of_its_share_of_samples() -> None:
    samples = [sample(f"{n}") for n in range(400)]
    plain = noise_for(samples, 0, SHAPE, SEEDS)
    settings = {"offset_noise": True, "noise_offset": 0.3, "noise_offset_probability": 0.25}
    shift = noises(**settings).draw(samples, 0, SHAPE, 0)[0] - plain
    flat = shift.flatten(2)
    assert torch.allclose(flat.amax(2), flat.amin(2), atol=1e-6)  # one number a channel
    moved = shift.flatten(1).abs().amax(1) > 1e-6
    assert 0.18 < moved.float().mean() < 0.32
    assert 0.27 < shift[moved].mean((2, 3)).std() < 0.33
    together = noises(**settings).draw(samples[:3], 0, SHAPE, 0)[0]
    alone = noises(**settings).draw(samples[1:2], 0, SHAPE, 0)[0]
    assert torch.equal(alone[0], together[1])


def test_a_perturbation_is_seen_and_not_predicted_and_falls() -> None:
    samples = [sample(f"{n}") for n in range(200)]
    plain = noise_for(samples, 0, SHAPE, SEEDS)
    for step, strength in ((0, 0.1), (50, 0.05), (100, 0.0), (500, 0.0)):
        settings = {"input_perturbation": 0.1, "input_perturbation_steps": 100}
        noise, seen = noises(**settings).draw(samples, 0, SHAPE, step)
        assert torch.equal(noise, plain)
        if strength:
            assert seen is not None
            assert (seen - plain).std().item() == pytest.approx(strength, rel=0.05)
            assert abs(((seen - plain) * plain).mean()) < 0.01  # noise of its own
        else:
            assert seen is None
    steady = noises(input_perturbation=0.1).draw(samples, 0, SHAPE, 10_000)[1]
    assert steady is not None
