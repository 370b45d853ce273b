"""Every number format on a CUDA device: near the plain model, learning, resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from simpletuner.core.types import Place
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings
from simpletuner.precision.quantise import quantise
from simpletuner.precision.quantisers import QUANTISERS
from tests.architecture.test_meta import LOADED, micro_batch
from tests.gpu.test_road import run_of
from tests.gpu.test_waits import STEPS_BEFORE, stepper_on_cuda

pytestmark = pytest.mark.gpu

FORMATS = [name for name in QUANTISERS if name != "no_change"]


@pytest.mark.parametrize("via", ["accelerator", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FORMATS)
def test_a_forward_is_near_the_plain_one(
    name: str, dtype: torch.dtype, via: str, tiny_sdxl: Path
) -> None:
    settings = ModelSettings(model_family="sdxl", pretrained_model_name_or_path=str(tiny_sdxl))
    family, place = open_family(settings), Place(torch.device("cuda"), dtype)
    told = {}

    def shrink(part: str, model: torch.nn.Module, device: torch.device) -> None:
        told[part] = quantise(model, part, name, device, via=via)

    plain, small = family.open_denoiser(place), family.open_denoiser(place, shrink)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 16, generator=generator).to("cuda", dtype)
    more = {
        "encoder_hidden_states": torch.randn(2, 77, 64, generator=generator).to("cuda", dtype),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(2, 32, generator=generator).to("cuda", dtype),
            "time_ids": torch.full((2, 6), 64.0, device="cuda"),
        },
    }
    t = torch.tensor([100, 700], device="cuda")
    with torch.no_grad():
        exact, found = (model(x, t, **more).sample.float() for model in (plain, small))
    error = ((found - exact).norm() / exact.norm()).item()
    limits = {"int8": 0.05, "fp8": 0.15, "nf4": 0.4, "int4": 0.4, "int2": 1.2}
    assert error < limits[name.split("-")[0]], error
    assert told["unet"].after < told["unet"].before


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_over_it_learns_and_resumes(name: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    run = run_of(
        tmp_path / "run",
        ("sdxl", tiny_sdxl),
        base_model_precision=name,
        mixed_precision="bf16",
        validation_disable=True,
    )
    assert run.train(max_train_steps=3) == 0
    assert run.train(max_train_steps=6) == 0
    assert all(math.isfinite(loss) for loss in run.losses())
    assert len(run.losses()) == 6
    assert f"in {name}" in json.loads((run.out / "run.json").read_text())["summary"]["precision"]


@pytest.fixture
def strict() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("kind", ["tiny_sdxl", "tiny_sdxl_v"])
def test_everything_that_shapes_noise_and_loss_waits_for_nothing(
    kind: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    stepper = stepper_on_cuda("sdxl", folder, torch.bfloat16, LOADED)
    masked = micro_batch("sdxl", first=2, regularises=True, mask=torch.ones(2, 1, 8, 8))
    pinned = [(p, b.pinned()) for p, b in (micro_batch("sdxl", first=0), masked)]
    for step in range(STEPS_BEFORE):
        stepper.step(step, pinned)
    torch.cuda.set_sync_debug_mode("error")
    outcome = stepper.step(STEPS_BEFORE, pinned)
    torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(outcome.loss.item())


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}])
def test_kinds_of_lora_train_and_are_verified(
    settings: dict[str, bool], tiny_sdxl: Path, tmp_path: Path
) -> None:
    run = run_of(tmp_path / "run", ("sdxl", tiny_sdxl), mixed_precision="bf16", **settings)
    assert run.train(max_train_steps=4) == 0
