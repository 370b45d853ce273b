"""Every built optimizer on a CUDA device: it resumes bit for bit, and waits as its row says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import Parameter

from simpletuner.core.seeds import Seeds
from simpletuner.core.types import ParamGroup
from simpletuner.optim.build import build_optimizer, load_optimizer_tensors, optimizer_tensors
from simpletuner.optim.optimizers import OPTIMIZERS
from simpletuner.optim.settings import OptimizerSettings
from tests.runs import Run

pytestmark = pytest.mark.gpu

BUILT = [name for name, row in OPTIMIZERS.items() if not row.pending]
SHAPES = {
    "wide.weight": (512, 1024),
    "up.weight": (8, 4),
    "conv.weight": (4, 4, 3, 3),
    "bias": (8,),
}
"""The first is so large that its moments page."""


def groups_of() -> tuple[ParamGroup, ...]:
    generator = torch.Generator().manual_seed(0)
    values = {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}
    return (ParamGroup("all", {n: Parameter(value.cuda()) for n, value in values.items()}),)


def optimizer_of(name: str, groups: tuple[ParamGroup, ...]) -> torch.optim.Optimizer:
    rate = 1.0 if OPTIMIZERS[name].fact("own_rate") else 1e-2
    return build_optimizer(OptimizerSettings(optimizer=name, learning_rate=rate), groups, Seeds(4))


def step(optimizer: torch.optim.Optimizer, groups: tuple[ParamGroup, ...], steps: range) -> None:
    for number in steps:
        for place, parameter in enumerate(groups[0].parameters.values()):
            generator = torch.Generator().manual_seed(100 * number + place)
            parameter.grad = torch.randn(parameter.shape, generator=generator).cuda()
        optimizer.step()


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
    return {name: [t.dtype, t.detach().cpu().flatten().tolist()] for name, t in tensors.items()}


@pytest.mark.parametrize("name", BUILT)
def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole, first, second = groups_of(), groups_of(), groups_of()
    unbroken, before = optimizer_of(name, whole), optimizer_of(name, first)
    step(unbroken, whole, range(14))
    step(before, first, range(11))
    kept = {k: v.cpu().contiguous() for k, v in optimizer_tensors(before, first).items()}
    save_file(kept, tmp_path / "optimizer.safetensors")
    with torch.no_grad():
        for key, parameter in second[0].parameters.items():
            parameter.copy_(first[0].parameters[key])
    after = optimizer_of(name, second)
    load_optimizer_tensors(after, second, load_file(tmp_path / "optimizer.safetensors"))
    step(after, second, range(11, 14))

    assert bits(dict(second[0].parameters)) == bits(dict(whole[0].parameters))
    assert bits(optimizer_tensors(after, second)) == bits(optimizer_tensors(unbroken, whole))


@pytest.fixture
def strict() -> Iterator[None]:
    """Every wait of the CPU for the device is an error; set by the test, unset here."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.usefixtures("strict")
def test_a_step_waits_as_its_row_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = groups_of()
    optimizer = optimizer_of(name, groups)
    step(optimizer, groups, range(12))
    for parameter in groups[0].parameters.values():
        parameter.grad = torch.ones_like(parameter)
    monkeypatch.setattr(torch.cuda, "synchronize", waits)  # which the mode does not see
    torch.cuda.set_sync_debug_mode("error")
    if OPTIMIZERS[name].fact("syncs"):
        with pytest.raises(RuntimeError):
            optimizer.step()
    else:
        optimizer.step()


def waits(*_: object) -> None:
    raise RuntimeError("the whole device is waited for")


LOKR = {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 4}


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "full", "learning_rate": 1e-4},
        {"model_type": "full", "learning_rate": 1e-4, "mixed_precision": "bf16", "use_ema": True},
        {"model_type": "full", "learning_rate": 1e-4, "optimizer": "bnb-adamw8bit-paged"},
        {"lora_type": "lycoris", "lycoris_config": LOKR},
        {"lora_type": "lycoris", "lycoris_config": {"algo": "full"}, "mixed_precision": "bf16"},
        {"lora_type": "lycoris", "lycoris_config": LOKR, "base_model_precision": "int8-quanto"},
        {"optimizer": "adamw_schedulefree"},
        {"optimizer": "prodigy", "learning_rate": 1.0},
        {"optimizer": "bnb-lion8bit-paged", "mixed_precision": "bf16"},
    ],
    ids=lambda settings: " ".join(str(v) for v in settings.values())[:60],
)
def test_a_run_ends_well_and_goes_on_where_it_was(
    tmp_path: Path, tiny_sdxl: Path, settings: dict[str, Any]
) -> None:
    more = {"lr_scheduler": "constant", "max_train_steps": 6, "disable_tf32": True, **settings}
    unbroken, broken = Run(tmp_path / "one", tiny_sdxl), Run(tmp_path / "two", tiny_sdxl)
    for run in (unbroken, broken):
        run.settings |= more
    assert unbroken.train() == 0
    assert unbroken.events()[-1]["verified"].startswith("verified: ")
    assert broken.train(max_train_steps=4) == 0
    assert broken.train() == 0
    assert broken.losses()[-2:] == pytest.approx(unbroken.losses()[-2:], rel=1e-2)
