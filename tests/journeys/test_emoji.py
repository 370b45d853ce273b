"""The shipped example on the trained base: what is exported is what was learnt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scripts.measure_emoji_example import Measured, measure
from simpletuner.apps.cli import main
from simpletuner.config.find import examples_folder
from tests.emoji import fluent, likeness

DATA = examples_folder() / "emoji/data"
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, cut short, with two of its prompts; read it only."""
    root = tmp_path_factory.mktemp("emoji")
    prompts = {
        "bell": {"prompt": "a 3D emoji of a bell", "reference": f"{DATA}/bell.webp"},
        "koala": {"prompt": "a 3D emoji of a koala", "reference": f"{DATA}/koala.webp"},
    }
    (root / "prompts.json").write_text(json.dumps(prompts))
    settings = {
        "output_dir": root / "out",
        "user_prompt_library": root / "prompts.json",
        "max_train_steps": 60,
        "checkpoint_step_interval": 0,
        "validation_num_inference_steps": 8,
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    assert main(["train", "--example", "emoji", *flags]) == 0
    return root / "out"


@pytest.fixture(scope="module")
def measured(out: Path) -> Measured:
    return measure(out / WEIGHTS, strengths=(0.0, 0.5, 1.0), most=6)


def test_the_loss_falls_in_the_stock_pipeline_also_on_pictures_held_out(
    measured: Measured,
) -> None:
    assert measured.fall("data") > 0.25
    assert measured.fall("held_out") > 0.25


def test_strength_0_is_the_base_and_half_the_strength_lies_between(measured: Measured) -> None:
    assert measured.zero_is_base
    for part, losses in measured.by_strength.items():
        assert losses[0.0] == measured.base[part]
        assert losses[1.0] < losses[0.5] < losses[0.0]


def test_the_sheet_shows_base_result_and_reference_of_every_prompt(out: Path) -> None:
    sheet = np.asarray(Image.open(out / "before_after.png")).astype(int)
    assert sheet.shape == (31 + 2 * 264, 208 + 3 * 264, 3)
    assert len(list((out / "benchmarks/base_model").glob("*.png"))) == 2
    for line in range(2):
        y = 31 + 264 * line
        base, result, reference = (
            sheet[y : y + 256, 208 + 264 * i : 464 + 264 * i] for i in range(3)
        )
        assert np.abs(base - result).mean() > 1
        for picture in (base, result, reference):
            assert picture.min() < 200  # something is drawn


def test_the_bases_pictures_show_what_was_asked_for(out: Path) -> None:
    folder, names = out / "benchmarks/base_model", fluent()[1]
    for name in ("bell", "koala"):
        (path,) = folder.glob(f"{name}_*.png")
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        (scores,) = likeness(pixels[None].float() / 127.5 - 1, names)
        assert names[int(scores.argmax())] == name
