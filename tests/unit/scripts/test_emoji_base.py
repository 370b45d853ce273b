"""The parts of the emoji model's build that can be checked without training it."""

import pytest
import torch
from torch import nn

from scripts.emoji_base import vae
from scripts.emoji_base.parallel import _orthogonal, _Team, _Vectors, rate_at
from scripts.emoji_base.tokenizer import byte_pairs
from scripts.emoji_base.unet import new_unet


@pytest.fixture
def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8)


@pytest.fixture
def model() -> vae.AutoencoderKL:
    torch.manual_seed(5)
    return vae.new_vae().eval()


def test_a_folded_vae_has_white_latents_at_sdxls_scale(model, pictures):
    means, variances = vae.encode(model, pictures)
    vae.fold(model, *vae.moments(means), variances.mean((0, 2, 3)))

    scaled = vae.encode(model, pictures)[0] * 0.13025

    mean, covariance = vae.moments(scaled)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-3, rtol=0)
    expected = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(covariance, expected, atol=1e-3, rtol=0)


def test_a_folded_vae_reconstructs_what_it_did(model, pictures):
    means, variances = vae.encode(model, pictures)
    before = vae.decode(model, means)

    vae.fold(model, *vae.moments(means), variances.mean((0, 2, 3)))

    after = vae.decode(model, vae.encode(model, pictures)[0])
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)


def test_a_folded_vaes_spread_is_what_it_was_on_average(model, pictures):
    means, variances = vae.encode(model, pictures)
    mean, covariance = vae.moments(means)
    vae.fold(model, mean, covariance, variances.mean((0, 2, 3)))

    spread = vae.encode(model, pictures)[1].mean((0, 2, 3)) * 0.13025**2

    values, vectors = torch.linalg.eigh(covariance)
    whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    expected = torch.diag(whiten @ torch.diag(variances.mean((0, 2, 3)).double()) @ whiten.T)
    torch.testing.assert_close(spread.double(), expected, rtol=1e-3, atol=0)


def alone(vectors: _Vectors) -> _Team:
    numbers = sum(place.stop - place.start for place, _ in vectors.matrices)
    return _Team(0, 1, torch.zeros(numbers), lambda: None)


def test_every_linear_of_the_denoiser_takes_a_multiple_of_16():
    widths = {m.in_features for m in new_unet().modules() if isinstance(m, nn.Linear)}

    assert {width % 16 for width in widths} == {0}


def test_small_weights_take_the_step_of_torchs_adamw():
    torch.manual_seed(1)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    vectors = _Vectors.of(ours)
    options = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.01}
    optimizer = torch.optim.AdamW(theirs.parameters(), **options)

    for step in range(3):
        pixels = torch.randn(4, 3) * 0.1  # gradients below the clip
        for module in (ours, theirs):
            module.zero_grad(set_to_none=False)
            (module(pixels).square().mean() * 0.1).backward()
        vectors.step(step, 0.1, 0.99, alone(vectors))
        optimizer.step()

    torch.testing.assert_close(ours.weight, theirs.weight)


def test_the_rate_does_not_know_the_total_before_it_decays():
    assert rate_at(599, 1000, 1.0) == rate_at(599, None, 1.0) == 1.0
    assert rate_at(800, 1000, 1.0) == pytest.approx(0.505)


def test_byte_pairs_merge_the_most_frequent_first():
    vocab, merges = byte_pairs(["cat cat cat car"], 600)

    assert merges[:2] == [("c", "a"), ("ca", "t</w>")]
    assert vocab["cat</w>"] == 513


def test_inner_weights_take_the_step_of_torchs_muon():
    torch.manual_seed(1)
    ours, theirs = nn.Linear(32, 16, bias=False), nn.Linear(32, 16, bias=False)
    theirs.load_state_dict(ours.state_dict())
    vectors = _Vectors.of(ours)
    options = {"lr": 0.1, "weight_decay": 0.01, "momentum": 0.95, "eps": 1e-7}
    optimizer = torch.optim.Muon([theirs.weight], adjust_lr_fn="match_rms_adamw", **options)

    for step in range(3):
        pixels = torch.randn(64, 32) * 0.1
        for module in (ours, theirs):
            module.zero_grad(set_to_none=False)
            (module(pixels).square().mean() * 0.1).backward()
        vectors.step(step, 0.1, 0.99, alone(vectors))
        optimizer.step()

    # torch rounds to bf16 inside
    torch.testing.assert_close(ours.weight, theirs.weight, atol=3e-3, rtol=0)


def test_two_processes_share_the_matrices_and_take_one_step():
    torch.manual_seed(1)
    one = nn.Sequential(nn.Linear(32, 16), nn.Conv2d(16, 32, 3))
    vectors = _Vectors.of(one)
    vectors.gradients.normal_()
    start, gradients = vectors.weights.clone(), vectors.gradients.clone()
    vectors.step(0, 0.1, 0.99, alone(vectors))
    after, updates = vectors.weights.clone(), torch.zeros(alone(vectors).updates.shape)

    for rank in (0, 1):
        vectors.weights.copy_(start)
        vectors.gradients.copy_(gradients)
        vectors.first.zero_()
        vectors.second.zero_()
        vectors.step(0, 0.1, 0.99, _Team(rank, 2, updates, lambda: None))

    torch.testing.assert_close(vectors.weights, after)  # the second finds the first one's updates


def test_orthogonal_rows_have_length_one_or_so():
    torch.manual_seed(1)
    values = torch.linalg.svdvals(_orthogonal(torch.randn(24, 60)))

    assert 0.6 < float(values.min()) < float(values.max()) < 1.3
