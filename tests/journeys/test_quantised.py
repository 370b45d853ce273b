"""Runs over a base held in fewer bits: they learn, resume to the bit, and export a plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from simpletuner.precision.quantisers import QUANTISERS
from tests.runs import Run, make_pictures

FORMATS = [name for name in QUANTISERS if name != "no_change"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_over_a_quantised_base_resumes_to_the_bit(
    name: str, tiny_sdxl: Path, tmp_path: Path
) -> None:
    pictures = make_pictures(tmp_path / "pictures")
    common = {
        "base_model_precision": name,
        "cache_dir": str(tmp_path / "cache"),
        "validation_disable": True,
        "checkpoint_step_interval": 3,
    }
    found = {}
    for folder, stops in (("whole", (6,)), ("parts", (3, 6))):
        run = Run(tmp_path / folder, tiny_sdxl, pictures)
        run.settings |= common | {"lr_scheduler": "constant"}
        for steps in stops:
            assert run.train(max_train_steps=steps) == 0
        found[folder] = load_file(run.out / "pytorch_lora_weights.safetensors")
        summary = json.loads((run.out / "run.json").read_text())["summary"]
        assert f"linear layers in {name}" in summary["precision"]

    assert found["whole"].keys() == found["parts"].keys()
    assert all((found["whole"][key] == found["parts"][key]).all() for key in found["whole"])


def test_what_a_cpu_cannot_compute_is_refused_with_what_can(
    tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run", tiny_sdxl)
    assert run.train(base_model_precision="int8-quanto", mixed_precision="bf16") == 2
    said = capsys.readouterr()
    assert "set mixed_precision to no, or take int8-torchao" in said.out + said.err


def test_int8_computes_in_fp32_on_a_cpu_unless_told_otherwise(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", tiny_sdxl)
    del run.settings["mixed_precision"]
    settings = {"validation_disable": True, "max_train_steps": 1}
    assert run.train(base_model_precision="int8-quanto", **settings) == 0
    assert "float32" in json.loads((run.out / "run.json").read_text())["summary"]["precision"]


def test_captions_of_quantised_encoders_are_other_entries(tiny_sdxl: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", tiny_sdxl)
    run.settings |= {"validation_disable": True, "resume_from_checkpoint": "none"}
    assert run.train(max_train_steps=1) == 0
    plain = run.encoded()
    captions = plain - 8  # pictures

    assert run.train(max_train_steps=1, text_encoder_2_precision="int8-torchao") == 0
    assert run.encoded() - plain == captions
    assert run.train(max_train_steps=1, text_encoder_2_precision="int8-torchao") == 0
    assert run.encoded() - plain == captions
    assert run.train(max_train_steps=1) == 0
    assert run.encoded() - plain == captions
