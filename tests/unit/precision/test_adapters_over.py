"""DoRA and LyCORIS over each number format: as the table says, they learn, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from simpletuner.core.types import Place
from simpletuner.precision.quantise import quantise
from simpletuner.precision.quantisers import QUANTISERS, quantised_in
from tests.runs import Run
from tests.unit.training.builds import build_stepper, make_batch, window_of

CPU = torch.device("cpu")
FORMATS = [name for name in QUANTISERS if name != "no_change"]
ALGORITHMS: dict[str, dict[str, Any]] = {
    name: {"algo": name, "linear_dim": 4, "linear_alpha": 2, **more}
    for name, more in (
        ("lokr", {"factor": 4}),
        ("loha", {}),
        ("locon", {}),
        ("glora", {}),
        ("diag-oft", {}),
        ("boft", {}),
    )
}
HALVES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def learns(folder: Path, name: str, dtype: str, **adapter: Any) -> bool:
    """Six steps over a base in a format."""
    stepper = build_stepper(
        folder,
        Place(CPU, HALVES[dtype]),
        HALVES[dtype],
        adapter=adapter,
        base_format=name,
        learning_rate=1e-2,
    )
    window = window_of(make_batch(1, 2))
    losses = [stepper.step(0, window).loss.item() for _ in range(6)]
    return losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FORMATS)
def test_dora_learns_where_the_table_says_so(name: str, dtype: str, tiny_sdxl: Path) -> None:
    if QUANTISERS[name].fact("dora_in", dtype) == dtype and not quantised_in(name, "cpu", dtype):
        assert learns(tiny_sdxl, name, dtype, use_dora=True)


@pytest.mark.parametrize("name", [n for n in FORMATS if not QUANTISERS[n].fact("one_dtype")])
def test_weights_opened_in_fp32_learn_in_bf16_where_the_table_says_so(
    name: str, tiny_sdxl: Path
) -> None:
    bf16 = Place(CPU, torch.bfloat16)
    stepper = build_stepper(tiny_sdxl, bf16, torch.float32, base_format=name, learning_rate=1e-2)
    window = window_of(make_batch(1, 2))
    losses = [stepper.step(0, window).loss.item() for _ in range(6)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("name", [n for n in FORMATS if not QUANTISERS[n].fact("lycoris")])
def test_lycoris_learns_where_the_table_says_so(name: str, algo: str, tiny_sdxl: Path) -> None:
    config = {"lora_type": "lycoris", "lycoris_config": ALGORITHMS[algo]}
    for dtype in HALVES:
        if not quantised_in(name, "cpu", dtype):
            assert learns(tiny_sdxl, name, dtype, lora_rank=16, lora_alpha=None, **config)


@pytest.mark.parametrize("name", [n for n in FORMATS if QUANTISERS[n].fact("lycoris")])
def test_lycoris_is_refused_elsewhere_with_what_can_be_taken(
    name: str, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, tiny_sdxl)
    del run.settings["lora_rank"]
    run.settings |= {"lora_type": "lycoris", "lycoris_config": ALGORITHMS["lokr"]}
    run.settings |= {"validation_disable": True, "max_train_steps": 1}
    instead = QUANTISERS[name].fact("lycoris")
    assert run.train(base_model_precision=name) == 2
    said = capsys.readouterr().err
    assert f"lora_type lycoris cannot read weights in {name}; take {instead}, or set" in said
    assert run.train(base_model_precision=instead) == 0


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_takes_the_bytes_that_the_table_says(name: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2048, 1024, bias=False)

    block = nn.ModuleList([Block()]).requires_grad_(False)
    block._repeated_blocks = ("Block",)
    told = quantise(block, "part", name, CPU, via="cpu")
    expected = QUANTISERS[name].fact("weight_bytes")
    assert told.after / (2048 * 1024) == pytest.approx(expected, rel=1e-3)
