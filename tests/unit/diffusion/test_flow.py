"""Flow matching against its closed forms, published vectors and diffusers' own scheduler."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from simpletuner.core.seeds import Seeds
from simpletuner.diffusion.objective import Objective, objective_of
from simpletuner.diffusion.settings import DiffusionSettings
from simpletuner.diffusion.timesteps import auto_shift, flow_law, quantiles, shifted

EVEN = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000
QWEN: dict[str, Any] = {"max_image_seq_len": 8192, "max_shift": 0.9}
SIGMAS = torch.tensor([0.10, 0.25, 0.50, 0.75, 0.90], dtype=torch.float64)
UNIFORM = {"flow_use_uniform_schedule": True}


def sigma_of(u: torch.Tensor, tokens: int = 1024, **settings: Any) -> torch.Tensor:
    return flow_law(DiffusionSettings(**settings), {})(u, tokens, 0.0)


def flow(**settings: Any) -> Objective:
    return objective_of("flow_matching", {}, DiffusionSettings(**settings))


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("scale", "spread", "points"),
    [
        (0.5, 0.118, (0.305, 0.416, 0.500, 0.583, 0.695)),
        (1.0, 0.208, (0.162, 0.337, 0.500, 0.662, 0.838)),
        (1.5, 0.271, (0.078, 0.267, 0.500, 0.734, 0.922)),
        (2.0, 0.314, (0.036, 0.206, 0.500, 0.794, 0.964)),
    ],
)
def test_noise_levels_are_logit_normal(
    scale: float, spread: float, points: tuple[float, ...]
) -> None:
    sigma = sigma_of(EVEN, flow_sigmoid_scale=scale, flow_schedule_shift=1)

    at = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    # the published numbers were sampled and cut, so they may be 0.001 off
    assert sigma.mean().item() == pytest.approx(0.5, abs=1e-6)
    assert sigma.std().item() == pytest.approx(spread, abs=1.1e-3)
    assert sigma.quantile(at[:3]).tolist() == pytest.approx(list(points[:3]), abs=1.1e-3)
    assert sigma_of(at, flow_sigmoid_scale=scale, flow_schedule_shift=0).tolist() == pytest.approx(
        list(points), abs=1.1e-3
    )


@pytest.mark.parametrize(
    ("shift", "moved"),
    [
        (0.1, (0.0110, 0.0323, 0.0909, 0.2308, 0.4737)),
        (1, (0.10, 0.25, 0.50, 0.75, 0.90)),
        (3, (0.25, 0.50, 0.75, 0.90, 0.9643)),
        (3.158, (0.2597, 0.5128, 0.7595, 0.9045, 0.966)),
        (4, (0.3077, 0.5714, 0.80, 0.9231, 0.973)),
    ],
)
def test_a_shift_moves_noise_levels_as_published(shift: float, moved: tuple[float, ...]) -> None:
    assert shifted(SIGMAS, shift).tolist() == pytest.approx(list(moved), abs=6e-5)
    by_setting = sigma_of(SIGMAS, flow_schedule_shift=shift, **UNIFORM)
    assert torch.equal(by_setting, shifted(SIGMAS, shift))


def test_a_shift_of_nought_is_none_and_the_default_is_three() -> None:
    assert torch.equal(sigma_of(SIGMAS, flow_schedule_shift=0, **UNIFORM), SIGMAS)
    assert torch.equal(sigma_of(SIGMAS, **UNIFORM), shifted(SIGMAS, 3))


@pytest.mark.parametrize(
    ("px", "flux", "qwen"),
    [
        (256, 1.6487, 1.6487),
        (512, 1.8776, 1.7138),
        (768, 2.3319, 1.8280),
        (1024, 3.1582, 2.0008),
        (1328, 5.0671, 2.3033),
        (1536, 7.5132, 2.5899),
    ],
)
def test_the_shift_by_size_is_the_published_one(px: int, flux: float, qwen: float) -> None:
    tokens = (px // 16) ** 2

    assert auto_shift(tokens, {}) == pytest.approx(flux, abs=6e-5)
    assert auto_shift(tokens, QWEN) == pytest.approx(qwen, abs=6e-5)


def test_the_shift_by_size_wins_over_the_fixed_one_and_is_the_schedulers_own() -> None:
    settings = DiffusionSettings(flow_schedule_auto_shift=True, flow_schedule_shift=4, **UNIFORM)
    large, small = (flow_law(settings, QWEN)(SIGMAS, tokens, 0.0) for tokens in (4096, 256))

    assert torch.equal(large, shifted(SIGMAS, auto_shift(4096, QWEN)))
    assert torch.equal(small, shifted(SIGMAS, auto_shift(256, QWEN)))


def test_shifts_are_those_of_the_stock_scheduler() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    levels = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    fixed = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.double()
    mu = 0.5 + 0.65 * (2304 - 256) / (4096 - 256)
    by_size = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)

    torch.testing.assert_close(sigma_of(levels, **UNIFORM), fixed, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        sigma_of(levels, 2304, flow_schedule_auto_shift=True, **UNIFORM),
        by_size.time_shift(mu, 1.0, levels),
        atol=1e-12,
        rtol=0,
    )


def test_the_law_is_that_of_independent_draws() -> None:
    seeds = Seeds(3)
    drawn = torch.cat([sigma_of(quantiles(seeds, step, 4)) for step in range(2000)])

    back = drawn / (3 - 2 * drawn)  # the inverse of a shift of 3
    normal = torch.distributions.Normal(0.0, 1.0).cdf(back.logit())
    counts = (normal * 20).long().clamp(max=19).bincount(minlength=20).double()
    # 43.8 is passed by one uniform law in a thousand
    assert float(((counts - 400) ** 2 / 400).sum()) < 43.8


def test_the_ends_of_the_schedule_are_finite() -> None:
    ends = torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53, 1.0], dtype=torch.float64)

    for settings in ({}, UNIFORM, {"flow_schedule_auto_shift": True}):
        sigma = sigma_of(ends, **settings)
        assert sigma.isfinite().all()
        assert 0 <= sigma.min().item() <= sigma.max().item() <= 1
        assert sigma.tolist() == sorted(sigma.tolist())


def test_a_draw_is_the_straight_line_from_the_picture_to_the_noise() -> None:
    objective = flow()
    clean, noise = some(4, 16, 6, 8), some(4, 16, 6, 8, seed=1)
    t = objective.timesteps(quantiles(Seeds(0), 0, 4), 12)

    draw = objective.draw(clean, t, noise)

    sigma = (t / 1000).float()
    share = sigma.view(-1, 1, 1, 1)
    assert torch.equal(draw.sigma, sigma)
    assert torch.equal(draw.timestep, 1000 * sigma)
    assert torch.equal(draw.noisy, (1 - share) * clean + share * noise)
    assert torch.equal(draw.target, noise - clean)
    assert draw.weight.tolist() == [1] * 4
    torch.testing.assert_close(objective.clean(draw, draw.target), clean, atol=1e-6, rtol=0)


def test_a_draw_is_fp32_also_for_bf16_latents_and_tells_a_timestep_that_is_not_whole() -> None:
    clean, noise = some(2, 16, 8, 8).bfloat16(), some(2, 16, 8, 8, seed=1)
    t = torch.tensor([513.7, 997.6], dtype=torch.float64)

    draw = flow().draw(clean, t, noise)

    assert {x.dtype for x in vars(draw).values()} == {torch.float32}
    # in bf16 these would be 512 and 996
    assert draw.timestep.tolist() == pytest.approx([513.7, 997.6], abs=1e-4)


def test_a_draw_runs_on_the_meta_device_with_timesteps_from_the_cpu() -> None:
    objective = flow()
    clean = torch.zeros(2, 16, 8, 8, device="meta")

    t = objective.timesteps(torch.tensor([0.1, 0.9], dtype=torch.float64), 16)
    draw = objective.draw(clean, t, torch.zeros_like(clean))
    found = objective.clean(draw, draw.target)

    assert {x.device.type for x in [*vars(draw).values(), found]} == {"meta"}
    assert found.shape == clean.shape
