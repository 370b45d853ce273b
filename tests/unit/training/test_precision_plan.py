"""The precision plan: what a run says of its parts is what they are held in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.adapters.method import attach
from simpletuner.adapters.settings import AdapterSettings
from simpletuner.apps.cli import main
from simpletuner.core.types import Place
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings
from simpletuner.precision.plan import PlanRow, plan_lines
from simpletuner.precision.quantise import foreseen, weight_bytes
from tests.runs import Run


def plan_of(run: Run) -> dict[str, dict[str, Any]]:
    rows = json.loads((run.out / "run.json").read_text())["precision"]
    return {row["part"]: row for row in rows}


@pytest.fixture
def run(tmp_path: Path, tiny_sdxl: Path) -> Run:
    run = Run(tmp_path, tiny_sdxl)
    run.settings |= {"validation_disable": True, "max_train_steps": 1}
    return run


def test_every_part_is_named_with_what_it_is_held_in(run: Run, tiny_sdxl: Path) -> None:
    chosen = {
        "base_model_precision": "int8-torchao",
        "text_encoder_2_precision": "nf4-bnb",
        "mixed_precision": "bf16",
        "vae_dtype": "fp32",
        "use_ema": True,
    }
    assert run.train(**chosen) == 0
    plan = plan_of(run)
    held = {part: (row["held"], row["computes"], row["backend"]) for part, row in plan.items()}
    assert held == {
        "text_encoder": ("bf16", "bf16", "torch"),
        "text_encoder_2": ("nf4-bnb", "bf16", "bitsandbytes"),
        "vae": ("fp32", "fp32", "torch"),
        "unet": ("int8-torchao", "bf16", "torchao.quantization"),
        "trained": ("fp32", "bf16", "torch"),
        "average": ("fp32", "fp32", "torch"),
    }
    settings = ModelSettings(model_family="sdxl", pretrained_model_name_or_path=str(tiny_sdxl))
    family = open_family(settings)
    whole = family.open_denoiser(Place(torch.device("cpu"), torch.bfloat16))
    unet = plan["unet"]
    assert unet["before"] == weight_bytes(whole)
    assert unet["after"] < unet["before"]
    assert {"time_embedding", "add_embedding"} <= set(unet["exact"])
    assert unet["rest"] == "bf16"
    kinds = [m for n, m in whole.named_modules() if isinstance(m, torch.nn.Linear)]
    assert 0 < unet["layers"] < len(kinds)
    assert plan["text_encoder_2"]["after"] < plan["text_encoder_2"]["before"]
    trained = attach(whole, family, AdapterSettings(lora_rank=4)).parameters().values()
    assert plan["trained"]["after"] == sum(4 * p.numel() for p in trained)
    notice = run.notices()
    assert "precision plan" in notice
    assert "held in int8-torchao by torchao.quantization" in notice


def test_encoders_that_are_not_opened_are_told_without_a_size(run: Run) -> None:
    for _ in range(2):
        assert run.train(text_encoder_1_precision="int8-torchao") == 0
    row = plan_of(run)["text_encoder"]
    assert (row["held"], row["before"], row["after"]) == ("int8-torchao", None, None)
    assert row["note"] == "not opened: what it encodes is in the cache"


def test_a_full_run_has_no_weights_beside_the_model_s(run: Run) -> None:
    del run.settings["lora_rank"]
    assert run.train(model_type="full", mixed_precision="fp16") == 0
    plan = plan_of(run)
    assert "trained" not in plan
    assert (plan["unet"]["held"], plan["unet"]["computes"]) == ("fp32", "fp16")
    assert plan["vae"]["held"] == "fp32"


def test_it_is_foreseen_without_weights(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = {"base_model_precision": "nf4-bnb", "mixed_precision": "bf16"}
    assert run.train(**chosen) == 0
    before = plan_of(run)
    capsys.readouterr()
    assert main(["estimate", "--config", str(run.write(**chosen)), "--json"]) == 0
    foreseen = {row["part"]: row for row in json.loads(capsys.readouterr().out)["plan"]}
    assert foreseen.keys() == before.keys()
    assert foreseen["trained"] == before["trained"]
    # scales in a layer of few weights may be padded otherwise
    assert foreseen["unet"]["after"] == pytest.approx(before["unet"]["after"], rel=1e-3)
    assert foreseen["unet"]["layers"] == before["unet"]["layers"]


def test_a_layer_of_a_list_is_called_by_its_own_name() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = torch.nn.Linear(32, 32)
            self.odd = torch.nn.Linear(32, 24)

    model = torch.nn.Module()
    model._repeated_blocks = ("Block",)
    model.blocks = torch.nn.ModuleList([Block(), Block()])
    model.resnets = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
    model.first = torch.nn.Sequential()
    model.first.add_module("inner", torch.nn.Linear(8, 8))
    found = foreseen(model.to("meta"), "unet", "int8-torchao")
    assert found.layers == 2
    assert found.kept == {"for a side that is no multiple of 16": 2}
    assert found.outside == ("resnets", "first")


def test_the_table_is_read_by_people() -> None:
    rows = [
        PlanRow("vae", "fp32", "fp32"),
        PlanRow(
            "unet",
            "bf16",
            "int8-quanto",
            "optimum.quanto",
            7,
            ("time_embedding", "2 layers for a reason"),
            "bf16",
            4 << 20,
            2 << 20,
        ),
    ]
    assert plan_lines(rows) == [
        "precision plan",
        "  vae   computes in fp32  held in fp32",
        "  unet  computes in bf16  held in int8-quanto by optimum.quanto, 7 layers  4.0 -> 2.0 MiB",
        "    in bf16: time_embedding, 2 layers for a reason",
    ]
