"""Runs that make the model fit its device learn what a plain run learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from simpletuner.apps.cli import main
from tests.journeys.test_controlnet import controlled
from tests.runs import Run

SHOWN = {
    "lr_scheduler": "constant",
    "disable_benchmark": False,
    "validation_disable": False,
    "validation_step_interval": 2,
    "validation_resolution": "64x64",
}


def result(run: Run, **settings: Any) -> tuple[list[float], dict[str, torch.Tensor], bytes]:
    """Losses, weights, and the picture of the last step."""
    assert run.train(**settings) == 0
    net = run.out / "controlnet/diffusion_pytorch_model.safetensors"
    lora = run.out / "pytorch_lora_weights.safetensors"
    picture = max((run.out / "validation_images").glob("step_4_*.png")).read_bytes()
    return run.losses(), load_file(net if net.is_file() else lora), picture


@pytest.mark.parametrize(
    "settings",
    [
        {"musubi_blocks_to_swap": 1, "gradient_checkpointing_backend": "unsloth"},
        {"enable_group_offload": True, "use_dora": True, "use_ema": True},
        {"enable_group_offload": True, "group_offload_type": "leaf_level", "to_disk": True},
        {"enable_group_offload": True, "mixed_precision": "bf16", "to_disk": True},
        {"enable_group_offload": True, "base_model_precision": "int8-quanto"},
        {"enable_group_offload": True, "controlnet": True},
    ],
    ids=["swap", "blocks", "layers", "bf16", "int8", "controlnet"],
)
def test_a_run_ends_the_same_and_goes_on_the_same(
    tmp_path: Path, tiny_sd3: Path, settings: dict[str, Any]
) -> None:
    settings = {**settings, **SHOWN, "gradient_checkpointing": True}
    net = settings.pop("controlnet", False)
    ways = {"enable_group_offload", "group_offload_type", "musubi_blocks_to_swap"}
    own = ways | {"gradient_checkpointing_backend"}
    more = {}
    if settings.pop("to_disk", False):
        more["group_offload_to_disk_path"] = str(tmp_path / "disk")

    def of(name: str) -> Run:
        root = tmp_path / name
        run = controlled(root, tiny_sd3, "sd3") if net else Run(root, tiny_sd3)
        run.settings |= {"model_family": "sd3", "max_train_steps": 4}
        if net:
            del run.settings["lora_rank"]
        return run

    plain = result(of("plain"), **{k: v for k, v in settings.items() if k not in own})
    run = of("fitted")
    assert run.train(**settings, **more, max_train_steps=2) == 0
    found = result(run, **settings, **more)
    assert found[0] == plain[0]
    assert found[1].keys() == plain[1].keys()
    assert all(torch.equal(found[1][name], value) for name, value in plain[1].items())
    assert found[2] == plain[2]


def test_an_estimate_counts_what_waits(
    tmp_path: Path, tiny_sdxl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, said = Run(tmp_path, tiny_sdxl), []
    run.settings |= {"gradient_checkpointing": True}
    ways = (
        {},
        {"musubi_blocks_to_swap": 2},
        {"enable_group_offload": True},
        {"enable_group_offload": True, "group_offload_type": "leaf_level"},
    )
    for settings in ways:
        assert main(["estimate", "--config", str(run.write(**settings)), "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0]["waiting"] == 0
    waiting = [each["waiting"] for each in said]
    assert waiting == sorted(waiting)
    assert len(set(waiting)) == 4
    for each in said:
        assert each["device"] == said[0]["device"] - each["waiting"]
        assert each["waiting"] < each["base"]
    assert main(["estimate", "--config", str(run.write(**ways[1]))]) == 0
    assert "\nof them off the device" in capsys.readouterr().out


def test_a_compiled_run_learns_the_same_and_goes_on(tmp_path: Path, tiny_sd3: Path) -> None:
    """The road that compiles C++: half a minute for a model of this size."""
    chosen = {"model_family": "sd3", "lr_scheduler": "constant", "validation_disable": True}
    plain, compiled = (Run(tmp_path / name, tiny_sd3) for name in ("plain", "compiled"))
    for run in (plain, compiled):
        run.dataset |= {"crop": True, "crop_aspect": "square"}  # each shape is compiled by itself
    assert plain.train(**chosen) == 0
    before = dict(counters["inductor"])
    assert compiled.train(**chosen, dynamo_backend="inductor", max_train_steps=2) == 0
    assert compiled.train(**chosen, dynamo_backend="inductor") == 0
    assert compiled.losses() == pytest.approx(plain.losses(), rel=1e-5)
    assert counters["inductor"] != before
    name = "pytorch_lora_weights.safetensors"
    weights = load_file(compiled.out / name)
    for key, value in load_file(plain.out / name).items():
        torch.testing.assert_close(weights[key], value, atol=2e-5, rtol=1e-2)
