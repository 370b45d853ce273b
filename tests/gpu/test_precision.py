"""Precision on a CUDA device: TF32 by default and exact where the user says so, and fp16."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from simpletuner.runtime.runtime import Runtime
from tests.gpu.test_road import run_of

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """Torch's switches are of the process: put back for the tests after these."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


def test_the_switch_decides_how_exact_a_product_is() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact, errors = a.double() @ b.double(), {}
    for tf32 in (True, False):
        place = Runtime.start(torch.float32, tf32=tf32).place
        found = (a.to(place.device) @ b.to(place.device)).cpu().double()
        errors[tf32] = float((found - exact).norm() / exact.norm())
    assert errors[False] < 1e-6
    assert errors[True] < 1e-3
    if torch.cuda.get_device_capability() >= (8, 0) and torch.version.hip is None:
        assert errors[True] > 1e-5


@pytest.mark.parametrize("exact", [True, False])
def test_a_run_turns_it_as_the_setting_says(exact: bool, tiny_sdxl: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", ("sdxl", tiny_sdxl), disable_tf32=exact)
    assert run.train(max_train_steps=1) == 0
    assert torch.backends.cuda.matmul.allow_tf32 is not exact
    resolved = json.loads((run.out / "resolved_config.json").read_text())
    assert resolved["settings"]["disable_tf32"] is exact


@pytest.mark.parametrize(
    "method", [{}, {"model_type": "full"}, {"base_model_precision": "nf4-bnb"}]
)
def test_a_run_in_fp16_learns_and_resumes(
    method: dict[str, str], tiny_sdxl: Path, tmp_path: Path
) -> None:
    run = run_of(tmp_path / "run", ("sdxl", tiny_sdxl), mixed_precision="fp16", **method)
    if "model_type" in method:
        run.settings.pop("lora_rank", None)
    assert run.train(max_train_steps=3) == 0
    assert run.train(max_train_steps=6) == 0
    assert len(run.losses()) == 6
    assert all(math.isfinite(loss) for loss in run.losses())
    assert (run.out / "checkpoint-6/scaler.safetensors").is_file()
