"""Losses and their weights against torch's own and the vectors of the field's formulas."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from simpletuner.core.types import Draw
from simpletuner.diffusion.losses import HUBER_SCHEDULES, LOSSES, Loss, per_sample
from simpletuner.diffusion.objective import Flow, Objective, objective_of
from simpletuner.diffusion.settings import DiffusionSettings
from tests.unit.training.builds import build_stepper, make_batch, window_of

SDXL_BETAS = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
C = torch.tensor(0.1)


def loss_of(kind: str = "epsilon", **settings: object) -> Loss:
    chosen = DiffusionSettings(**settings)  # type: ignore[arg-type]
    return Loss.of(chosen, objective_of(kind, SDXL_BETAS, chosen))


def drawn(objective: Objective, t: list[int]) -> Draw:
    clean = torch.zeros(len(t), 1, 1, 1)
    return objective.draw(clean, torch.tensor(t), clean)


def test_l2_and_l1_are_torch_s_own() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, 8, 6, generator=generator)
    for name, stock in (
        ("l2", torch.nn.functional.mse_loss),
        ("l1", torch.nn.functional.l1_loss),
    ):
        found = per_sample(LOSSES[name].load()(prediction - target, C))
        expected = [stock(p, t) for p, t in zip(prediction, target, strict=True)]
        torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("c", [0.01, 0.1, 1.0])
def test_the_huber_losses_are_their_formulas_and_square_near_nought(c: float) -> None:
    off = torch.linspace(-3, 3, 101, dtype=torch.float64)
    root = (off.square() + c * c).sqrt() - c
    given = torch.tensor(c, dtype=torch.float64)
    torch.testing.assert_close(LOSSES["huber"].load()(off, given), 2 * c * root)
    torch.testing.assert_close(LOSSES["smooth_l1"].load()(off, given), 2 * root)
    near = torch.tensor([1e-4 * c])
    assert LOSSES["huber"].load()(near, C.new_tensor(c)).item() == pytest.approx(
        near.item() ** 2, rel=1e-4
    )


def test_the_schedules_of_c_are_the_vectors_of_sdxl() -> None:
    times = [0, 250, 500, 750, 999]
    for name, wanted in (
        ("exponential", [1.0, 0.56234, 0.31623, 0.17783, 0.10023]),
        ("snr", [0.94971, 0.41296, 0.23128, 0.13461, 0.10369]),
        ("constant", [0.1] * 5),
    ):
        loss = loss_of(huber_schedule=name, loss_type="huber")
        found = HUBER_SCHEDULES[name].load()(0.1, drawn(loss.objective, times), loss.objective)
        assert found.tolist() == pytest.approx(wanted, abs=2e-5), name


def test_a_flow_model_s_c_falls_with_its_noise_too() -> None:
    flow = Flow(lambda u, tokens: u)
    draw = flow.draw(
        torch.zeros(3, 1, 1, 1), torch.tensor([10.0, 500, 990]), torch.zeros(3, 1, 1, 1)
    )
    for name in ("snr", "exponential"):
        found = HUBER_SCHEDULES[name].load()(0.1, draw, flow).tolist()
        assert found == sorted(found, reverse=True)
        assert 0.09 < found[-1] < 0.12
        assert found[0] > 0.9


def test_min_snr_is_the_vectors_of_sdxl_by_what_is_predicted() -> None:
    """Fault 5 of the field: the divisor follows what the model is trained to predict."""
    times = [0, 1, 100, 250, 500, 750, 900, 999]
    vectors = {
        "epsilon": [0.004254, 0.008534, 0.591443, 1, 1, 1, 1, 1],
        "v_prediction": [
            *(0.004250, 0.008520, 0.528883, 0.673793),
            *(0.276333, 0.056170, 0.014151, 0.004660),
        ],
    }
    for kind, wanted in vectors.items():
        loss = loss_of(kind, snr_gamma=5)
        found = loss.weights(drawn(loss.objective, times))
        assert found.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-6), kind
        assert loss_of(kind).weights(drawn(loss.objective, times)).tolist() == [1] * 8


def test_min_snr_has_a_limit_where_there_is_no_signal() -> None:
    for kind, wanted in (("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)):
        loss = loss_of(kind, snr_gamma=5)
        silent = type(loss.objective)(torch.zeros(1000))  # type: ignore[call-arg]
        assert silent.min_snr(drawn(silent, [999]), 5.0).tolist() == [wanted]


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_soft_min_snr_is_the_harmonic_form_of_min_snr(sigma_data: float) -> None:
    times = [0, 100, 500, 999]
    gamma = sigma_data**-2
    settings = {"use_soft_min_snr": True, "soft_min_snr_sigma_data": sigma_data}
    over = {"epsilon": lambda r: r, "v_prediction": lambda r: r + 1, "sample": torch.ones_like}
    for kind, divisor in over.items():
        loss = loss_of(kind, **settings)
        found = loss.weights(drawn(loss.objective, times))
        abar = loss.objective.abar[times].double()  # type: ignore[attr-defined]
        ratio = abar / (1 - abar)
        wanted = ratio * gamma / (ratio + gamma) / divisor(ratio)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
        hard = loss_of(kind, snr_gamma=gamma).weights(drawn(loss.objective, times))
        assert bool((found < hard).all())
        assert bool((found > hard / 2 - 1e-6).all())


def test_soft_min_snr_of_v_is_the_published_weight_for_data_of_unit_spread() -> None:
    """``(sigma s)^2 / (sigma^2 + s^2)^2`` at s = 1, sigma being noise over signal."""
    loss = loss_of("v_prediction", use_soft_min_snr=True, soft_min_snr_sigma_data=1.0)
    draw = drawn(loss.objective, [0, 250, 500, 999])
    signal, spread = loss.objective.shares(draw)
    sigma = spread / signal
    torch.testing.assert_close(
        loss.weights(draw), sigma.square() / (sigma.square() + 1).square(), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("shape", [(2, 4, 8, 6), (2, 4, 3, 8, 6)])
def test_every_loss_is_one_number_a_sample_nought_for_the_right_answer(
    name: str, shape: tuple[int, ...]
) -> None:
    off = torch.tensor([0.0, 1.0]).view(2, *[1] * (len(shape) - 1)).expand(shape)
    found = per_sample(LOSSES[name].load()(off, C))
    assert found.shape == (2,)
    assert float(found[0]) == 0 < float(found[1])


@pytest.mark.parametrize("name", list(LOSSES))
def test_every_loss_runs_on_the_meta_device(name: str) -> None:
    batch = torch.zeros(2, 4, 8, 6, device="meta")
    c = torch.zeros(2, 1, 1, 1, device="meta")
    assert per_sample(LOSSES[name].load()(batch, c), batch[:, :1]).shape == (2,)


def test_a_mask_takes_elements_out_of_the_sum_and_not_out_of_the_count() -> None:
    errors = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 1, 4, 6)
    mask[0, :, :, 3:] = 0
    mask[0, :, 0, 0] = 0.5

    found = per_sample(errors, mask)

    kept = errors[0, :, :, :3].sum() - errors[0, :, 0, 0].sum() / 2
    torch.testing.assert_close(found, torch.stack([kept / (3 * 4 * 6), errors[1].mean()]))


@pytest.mark.parametrize("share", [1 / 24, 1 / 4, 1.0])
def test_a_normalised_mask_weighs_as_much_whatever_its_size(share: float) -> None:
    """Fault 13 of the field: the gradient shrinks with the mask."""
    mask = torch.zeros(1, 1, 4, 6)
    mask.view(-1)[: round(24 * share)] = 1
    errors = torch.ones(1, 3, 4, 6)
    assert per_sample(errors, mask).item() == pytest.approx(share)
    assert per_sample(errors, mask, normalise=True).item() == pytest.approx(1)
    assert per_sample(errors, mask * 0, normalise=True).item() == 0


def test_the_step_takes_the_loss_and_the_weights(tiny_sdxl: Path) -> None:
    window = window_of(make_batch(1, 2, 3))
    plain = build_stepper(tiny_sdxl).step(4, window).loss.item()
    for settings in (
        {"loss_type": "l1"},
        {"loss_type": "huber"},
        {"loss_type": "smooth_l1", "huber_schedule": "constant"},
        {"snr_gamma": 0.5},
        {"use_soft_min_snr": True},
        {"offset_noise": True, "noise_offset_probability": 1.0},
        {"input_perturbation": 0.3},
        {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 9.0},
    ):
        other = build_stepper(tiny_sdxl, diffusion=settings).step(4, window).loss.item()
        assert math.isfinite(other)
        assert abs(other - plain) > 1e-4, settings


# ---- Diff2Flow


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_flow_loss_is_that_of_the_flow_the_prediction_implies(kind: str) -> None:
    """With x0 and noise worked out of the noisy latent and the prediction, in fp64."""
    loss = loss_of(kind, diff2flow_enabled=True, diff2flow_loss=True)
    draw = drawn(loss.objective, [3, 250, 700, 990])
    prediction = draw.target + 0.1 * torch.randn(
        draw.target.shape, generator=torch.Generator().manual_seed(3)
    )
    abar = loss.objective.abar[draw.timestep.long()].double().view(-1, 1, 1, 1)  # type: ignore[attr-defined]
    signal, spread = abar.sqrt(), (1 - abar).sqrt()

    def flow(answer: torch.Tensor) -> torch.Tensor:
        noisy, answer = draw.noisy.double(), answer.double()
        if kind == "epsilon":
            noise, clean = answer, (noisy - spread * answer) / signal
        elif kind == "v_prediction":
            noise, clean = signal * answer + spread * noisy, signal * noisy - spread * answer
        else:
            noise, clean = (noisy - signal * answer) / spread, answer
        return noise - clean

    wanted = (flow(prediction) - flow(draw.target)).square()
    torch.testing.assert_close(loss.errors(prediction, draw).double(), wanted, rtol=2e-3, atol=1e-5)
    assert loss.errors(draw.target, draw).abs().max() == 0
