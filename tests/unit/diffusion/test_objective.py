"""The objectives against diffusers' own scheduler, published numbers and the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from simpletuner.core.errors import ConfigError
from simpletuner.diffusion.objective import objective_of

SDXL: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
KINDS = ("epsilon", "v_prediction", "sample")


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stock(**more: Any) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config({**SDXL, **more})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_draw_equals_the_stock_scheduler(kind: str, zero_snr: bool) -> None:
    config = {**SDXL, "rescale_betas_zero_snr": zero_snr}
    clean, noise = some(6, 4, 8, 6), some(6, 4, 8, 6, seed=1)
    t = torch.tensor([0, 1, 250, 500, 900, 999])

    draw = objective_of(kind, config).draw(clean, t, noise)

    scheduler = stock(rescale_betas_zero_snr=zero_snr)
    targets = {"epsilon": noise, "sample": clean}
    target = targets.get(kind, scheduler.get_velocity(clean, noise, t))
    torch.testing.assert_close(
        draw.noisy, scheduler.add_noise(clean, noise, t), atol=1e-6, rtol=1e-6
    )
    torch.testing.assert_close(draw.target, target, atol=1e-6, rtol=1e-6)
    sigma = (1 - scheduler.alphas_cumprod[t]).sqrt()
    torch.testing.assert_close(draw.sigma, sigma, atol=1e-6, rtol=1e-6)


def test_a_draw_is_fp32_also_for_bf16_latents_and_says_which_timestep_it_is() -> None:
    clean, noise = some(2, 4, 8, 8).bfloat16(), some(2, 4, 8, 8, seed=1)
    t = torch.tensor([7, 998])

    draw = objective_of("v_prediction", SDXL).draw(clean, t, noise)

    assert {x.dtype for x in vars(draw).values()} == {torch.float32}
    assert draw.timestep.tolist() == [7, 998]
    assert draw.weight.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("t", "abar"),
    [(0, 0.999150), (100, 0.894223), (500, 0.276333), (900, 0.014151), (999, 0.004660)],
)
def test_the_noise_level_of_sdxl_is_the_published_one(t: int, abar: float) -> None:
    zeros = torch.zeros(1, 4, 2, 2)

    draw = objective_of("epsilon", SDXL).draw(zeros, torch.tensor([t]), zeros)

    assert 1 - float(draw.sigma) ** 2 == pytest.approx(abar, abs=1e-6)


@pytest.mark.parametrize(("t", "abar"), [(100, 0.886761), (500, 0.241019), (999, 0.0)])
def test_a_zero_snr_schedule_ends_in_pure_noise(t: int, abar: float) -> None:
    clean, noise = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    config = {**SDXL, "rescale_betas_zero_snr": True}

    draw = objective_of("v_prediction", config).draw(clean, torch.tensor([t]), noise)

    assert float(draw.noisy) ** 2 == pytest.approx(abar, abs=1e-6)


def test_a_key_of_the_file_counts_also_where_a_loaded_scheduler_calls_it_a_default() -> None:
    from diffusers import EulerDiscreteScheduler

    loaded = dict(EulerDiscreteScheduler.from_config(SDXL).config)
    clean, noise = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)

    objective = objective_of("v_prediction", {**loaded, "rescale_betas_zero_snr": True})

    assert float(objective.draw(clean, torch.tensor([999]), noise).noisy) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_perfect_answer_gives_the_clean_latent_back(kind: str) -> None:
    objective = objective_of(kind, SDXL)
    clean, noise = some(4, 4, 8, 8), some(4, 4, 8, 8, seed=1)
    draw = objective.draw(clean, torch.tensor([0, 300, 700, 999]), noise)

    found = objective.clean(draw, draw.target)

    torch.testing.assert_close(found, clean, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_timestep_has_the_same_share_of_quantiles(kind: str) -> None:
    u = (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000

    t = objective_of(kind, SDXL).timesteps(u, 1024)

    assert torch.equal(t.bincount(), torch.full((1000,), 3))


def test_the_largest_quantile_is_still_a_timestep() -> None:
    u = torch.tensor([0.0, 1 - 2.0**-53, 1.0], dtype=torch.float64)

    assert objective_of("epsilon", SDXL).timesteps(u, 1024).tolist() == [0, 999, 999]


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_runs_on_the_meta_device_with_timesteps_from_the_cpu(kind: str) -> None:
    objective = objective_of(kind, SDXL)
    clean = torch.zeros(2, 4, 8, 8, device="meta")

    draw = objective.draw(clean, torch.tensor([3, 999]), torch.zeros_like(clean))
    found = objective.clean(draw, draw.target)

    assert {x.device.type for x in [*vars(draw).values(), found]} == {"meta"}
    assert found.shape == clean.shape


def test_a_prediction_type_that_is_not_built_is_named() -> None:
    with pytest.raises(ConfigError, match="prediction_type 'score' is not one of epsilon"):
        objective_of("score", SDXL)
