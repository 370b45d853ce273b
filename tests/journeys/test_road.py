"""From a folder of pictures to a LoRA, through the command line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from tests.runs import Run, make_pictures

SETTINGS = {
    "lora_alpha": 10,
    "validation_guidance": 4.0,
    "validation_seed": 7,
    "disable_benchmark": False,
}


@pytest.fixture(scope="module")
def done(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One finished run with alpha unlike rank; read it only."""
    run = Run(tmp_path_factory.mktemp("road"), tiny_sdxl)
    assert run.train(**SETTINGS) == 0
    return run


def test_everything_lies_where_other_tools_look_for_it(done: Run) -> None:
    for name in (
        "pytorch_lora_weights.safetensors",
        "resolved_config.json",
        "run.json",
        "events.jsonl",
        "checkpoint-2/manifest.json",
        "checkpoint-4/pytorch_lora_weights.safetensors",
        "validation_images/step_4_validation_0_64x96.png",
        "validation_images/step_4_validation_0_64x96.json",
    ):
        assert (done.out / name).is_file(), name


def test_the_last_event_says_what_was_verified(done: Run) -> None:
    last = done.events()[-1]
    assert last["event"] == "run.finished"
    assert last["lines"][-1] == "verified: 64 of 64 modules"
    assert json.loads((done.out / "run.json").read_text())["result"]["steps"] == 4


def test_the_stock_pipeline_with_the_lora_paints_the_validation_picture(
    done: Run, tiny_sdxl: Path
) -> None:
    recipe = json.loads((done.out / "validation_images/step_4_validation_0_64x96.json").read_text())
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(done.out / recipe["weights"])

    def paint() -> np.ndarray:
        return pipe(
            prompt=recipe["prompt"],
            negative_prompt=recipe["negative_prompt"],
            width=recipe["width"],
            height=recipe["height"],
            guidance_scale=recipe["guidance_scale"],
            num_inference_steps=recipe["num_inference_steps"],
            generator=torch.Generator("cpu").manual_seed(recipe["seed"]),
            output_type="np",
        ).images[0]

    stock = paint()
    ours = np.asarray(Image.open(done.out / "validation_images/step_4_validation_0_64x96.png"))
    assert np.array_equal((stock * 255).round().astype(np.uint8), ours)
    pipe.unload_lora_weights()
    without = paint()
    assert np.abs(without - stock).max() > 1e-5  # the adapter is what makes the picture
    base = np.asarray(Image.open(done.out / "benchmarks/base_model/validation_0_64x96.png"))
    assert np.array_equal((without * 255).round().astype(np.uint8), base)


def test_base_model_and_result_stand_side_by_side(done: Run) -> None:
    recipe = json.loads((done.out / "benchmarks/base_model/validation_0_64x96.json").read_text())
    sheet = np.asarray(Image.open(done.out / "before_after.png"))
    before, after = sheet[-264:-8, 208:464], sheet[-264:-8, 472:728]
    for shown, name in (
        (before, "benchmarks/base_model/validation_0_64x96.png"),
        (after, "validation_images/step_4_validation_0_64x96.png"),
    ):
        picture = np.asarray(Image.open(done.out / name))
        corner = shown[:2, (256 - 171) // 2 + 2]  # 64x96 becomes 171x256, in the middle
        assert np.array_equal(corner[0], picture[0, 0])
    assert recipe["weights"] is None


def test_a_second_start_encodes_nothing_and_says_the_run_is_finished(
    done: Run, tmp_path: Path, tiny_sdxl: Path
) -> None:
    again = Run(tmp_path, tiny_sdxl, done.pictures)
    shutil.copytree(done.out, again.out)
    before = again.encoded()
    assert again.train(**SETTINGS) == 0
    notices = [event["text"] for event in again.events("notice")]
    assert any("this run is finished: 4 of 4 steps" in text for text in notices)
    assert len(again.losses()) == 4
    assert again.encoded() == before


def test_the_dataset_folder_is_untouched_and_may_be_read_only(
    tmp_path: Path, tiny_sdxl: Path
) -> None:
    pictures = make_pictures(tmp_path / "pictures")
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in pictures.rglob("*")}
    pictures.chmod(0o555)
    try:
        assert Run(tmp_path / "run", tiny_sdxl, pictures).train(max_train_steps=1) == 0
    finally:
        pictures.chmod(0o755)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in pictures.rglob("*")} == before


def test_an_edited_picture_is_encoded_again_alone_and_a_renamed_one_is_not(
    tmp_path: Path, tiny_sdxl: Path
) -> None:
    run = Run(tmp_path, tiny_sdxl)
    run.dataset["caption_strategy"] = "instanceprompt"
    run.dataset["instance_prompt"] = "a picture"
    settings = {"max_train_steps": 1, "validation_disable": True, "on_data_change": "continue"}
    assert run.train(**settings) == 0
    first = run.encoded()
    assert first == 8 + 2  # pictures; the prompt and the dropped caption

    (run.pictures / "a_picture_number_0.png").rename(run.pictures / "b.png")
    assert run.train(**settings) == 0
    assert run.encoded() == first

    Image.new("RGB", (96, 64), "red").save(run.pictures / "b.png")
    os.utime(run.pictures / "b.png")
    assert run.train(**settings) == 0
    assert run.encoded() == first + 1


def test_validation_leaves_weights_optimizer_and_numbers_as_they_were(
    tmp_path: Path, tiny_sdxl: Path
) -> None:
    pictures = make_pictures(tmp_path / "pictures")
    plain = Run(tmp_path / "plain", tiny_sdxl, pictures)
    looked = Run(tmp_path / "looked", tiny_sdxl, pictures)
    assert plain.train(lora_dropout=0.1, validation_disable=True) == 0
    assert looked.train(lora_dropout=0.1, validation_step_interval=1) == 0
    assert len(list((looked.out / "validation_images").glob("*.png"))) == 4
    assert plain.losses() == looked.losses()
    for part in ("trainable", "optimizer"):
        one, other = (
            load_file(run.out / f"checkpoint-4/{part}.safetensors") for run in (plain, looked)
        )
        assert all(torch.equal(one[key], other[key]) for key in one)
