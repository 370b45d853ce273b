"""Noise belongs to a draw of a sample, never to its batch."""

from __future__ import annotations

from dataclasses import replace

import torch

from simpletuner.core.seeds import Seeds
from simpletuner.core.types import Geometry, Sample
from simpletuner.diffusion.noise import noise_for

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
