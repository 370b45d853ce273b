"""Every method, optimizer and schedule goes on to the bit; documentation/RESUME.md is its table."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.adapters.method import METHODS
from simpletuner.adapters.settings import STARTS
from simpletuner.optim.optimizers import OPTIMIZERS
from simpletuner.optim.schedules import SCHEDULES
from tests.resume_table import (
    CELLS,
    INT8,
    METHODS_TRIED,
    REFUSED_OVER_INT8,
    Cell,
    page,
)
from tests.runs import Run, make_pictures

DOCUMENT = Path(__file__).parents[2] / "documentation/RESUME.md"


@dataclass
class Bench:
    """Pictures and caches that the runs of one worker share."""

    root: Path
    model: Path
    pictures: Path = field(init=False)

    def __post_init__(self) -> None:
        self.pictures = make_pictures(self.root / "pictures")

    def run(self, cell: Cell) -> Run:
        run = Run(self.root / cell.name, self.model, self.pictures)
        run.settings |= {
            "cache_dir": str(self.root / "cache"),
            "validation_disable": True,
            "lr_scheduler": "constant",
            "peft_lora_target_modules": ["to_q"],
        }
        if cell.settings.get("model_type") == "full" or "lycoris_config" in cell.settings:
            del run.settings["peft_lora_target_modules"]
            del run.settings["lora_rank"]
        run.settings |= cell.settings
        if cell.settings.get("controlnet"):
            make_pictures(self.root / "control")  # the pictures themselves stand for edges
            run.dataset["conditioning_data"] = "control"
            control = {"id": "control", "conditioning_type": "controlnet"}
            run.more = [{**control, "instance_data_dir": str(self.root / "control")}]
        return run


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl: Path) -> Bench:
    return Bench(tmp_path_factory.mktemp("table"), tiny_sdxl)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor below a checkpoint, by its file and name."""
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("cell", CELLS, ids=[cell.name for cell in CELLS])
def test_four_steps_are_two_and_two_after_a_restart_to_the_bit(bench: Bench, cell: Cell) -> None:
    run = bench.run(cell)
    assert run.train() == 0
    straight = tensors(run.out / "checkpoint-4")
    halfway = tensors(run.out / "checkpoint-2")
    shutil.rmtree(run.out / "checkpoint-4")

    assert run.train() == 0

    resumed = tensors(run.out / "checkpoint-4")
    assert straight.keys() == resumed.keys()
    assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []
    assert any(not torch.equal(halfway[name], tensor) for name, tensor in straight.items())
    files = {name.partition(":")[0] for name in straight}
    assert ("ema.safetensors" in files) == bool(cell.settings.get("use_ema"))
    state = json.loads((run.out / "checkpoint-4/state.json").read_text())
    assert state["step"] == 4
    shutil.rmtree(run.out)


@pytest.mark.parametrize("method", REFUSED_OVER_INT8)
def test_what_the_table_calls_refused_is(
    bench: Bench, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bench.run(Cell("refused", {**METHODS_TRIED[method], **INT8}))
    assert run.train() == 2
    assert "base_model_precision" in capsys.readouterr().err


def test_the_table_leaves_out_nothing_that_is_built() -> None:
    tried: list[dict[str, Any]] = [dict(cell.settings) for cell in CELLS]
    for key, table in (("optimizer", OPTIMIZERS), ("lr_scheduler", SCHEDULES)):
        built = {name for name, row in table.items() if not row.pending}
        assert built == {settings[key] for settings in tried if key in settings}
    assert {name.partition("-")[0] for name in METHODS_TRIED} >= set(METHODS)
    assert set(METHODS_TRIED) >= set(STARTS)


def test_the_document_is_the_table() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == page()
