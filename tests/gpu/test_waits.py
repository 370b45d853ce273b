"""A step on a CUDA device never waits for it: what it reads is read one step later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.adapters.method import attach
from simpletuner.adapters.settings import AdapterSettings
from simpletuner.adapters.weights import Weights
from simpletuner.core.seeds import Seeds
from simpletuner.core.types import Place
from simpletuner.diffusion.settings import DiffusionSettings
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings
from simpletuner.optim.build import build_optimizer
from simpletuner.optim.settings import OptimizerSettings
from simpletuner.training.stepper import Stepper
from simpletuner.training.trainer import _Reading
from tests.architecture.test_meta import micro_batch

STEPS_BEFORE = 3
"""Libraries set themselves up in the first ones, and wait then."""

pytestmark = pytest.mark.gpu


@pytest.fixture
def strict() -> Iterator[None]:
    """Every wait of the CPU for the device is an error; set by the test, unset here."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def stepper_on_cuda(
    name: str, folder: Path, dtype: torch.dtype, diffusion: dict[str, Any] | None = None
) -> Stepper:
    seeds, place = Seeds(0), Place(torch.device("cuda"), dtype)
    settings = ModelSettings(model_family=name, pretrained_model_name_or_path=str(folder))
    family = open_family(settings)
    denoiser = family.open_denoiser(place)
    trainable = attach(denoiser, family, AdapterSettings())
    optimizing = OptimizerSettings(optimizer="torch-adamw")
    return Stepper.of(
        place,
        family,
        Weights(trainable, build_optimizer(optimizing, trainable.groups(), seeds)),
        DiffusionSettings(**(diffusion or {})),
        optimizing,
        10,
        seeds,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
@pytest.mark.usefixtures("strict")
def test_a_step_waits_for_nothing(
    family: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    stepper = stepper_on_cuda(family, request.getfixturevalue(f"tiny_{family}"), dtype)
    masked = micro_batch(family, first=2, regularises=True, mask=torch.ones(2, 1, 8, 8))
    pinned = [(p, b.pinned()) for p, b in (micro_batch(family, first=0), masked)]
    for step in range(STEPS_BEFORE):
        stepper.step(step, pinned)

    torch.cuda.set_sync_debug_mode("error")
    reading = _Reading(stepper.step(STEPS_BEFORE, pinned))
    torch.cuda.set_sync_debug_mode("default")

    loss, norm = reading.read()
    assert loss > 0
    assert norm > 0


@pytest.mark.usefixtures("strict")
def test_the_mode_sees_a_wait() -> None:
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError):
        torch.ones(1, device="cuda").item()
