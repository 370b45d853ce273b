"""Masks and regularisation through the command line."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.apps.cli import main
from simpletuner.training.stepper import Outcome, Stepper
from tests.runs import make_pictures
from tests.ways import Bench, Way

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def run(bench: Bench, tmp_path: Path) -> Way:
    """The bench's run with a mask for each picture: its left half."""
    run = bench.fresh(tmp_path)
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in run.pictures.iterdir():
        with Image.open(path) as image:
            mask = Image.new("L", image.size)
            mask.paste(255, (0, 0, image.width // 2, image.height))
        mask.save(masks / f"{path.stem}.webp", lossless=True)
    run.dataset["conditioning_data"] = "masks"
    run.more = [{"id": "masks", "conditioning_type": "mask", "instance_data_dir": str(masks)}]
    return run


def test_masks_lower_the_loss_and_encode_nothing_anew(run: Way, bench: Bench) -> None:
    assert run.train() == 0
    pairs = list(zip(run.losses(), bench.done.losses(), strict=True))
    assert all(0.2 < ours / whole < 0.8 for ours, whole in pairs[:1])
    assert run.encoded() == 0
    assert json.loads((run.out / "resolved_config.json").read_text())["paired"] == {
        "pictures": [
            {
                "id": "masks",
                "conditioning_type": "mask",
                "instance_data_dir": run.more[0]["instance_data_dir"],
            }
        ]
    }
    again = run.losses()
    assert run.train(resume_from_checkpoint="checkpoint-2") == 0
    assert run.losses()[4:] == again[2:]

    assert run.train(resume_from_checkpoint="none", masked_loss_probability=0) == 0
    assert run.losses()[6:] == bench.done.losses()


def test_a_changed_mask_is_told_at_a_resume(run: Way, capsys: Captured) -> None:
    assert run.train() == 0
    Image.new("L", (96, 64), 255).save(run.root / "masks/a_picture_number_0.webp", lossless=True)
    assert run.train(max_train_steps=6) == 3
    assert "dataset pictures: masks changed" in capsys.readouterr().err
    assert run.train(max_train_steps=6, on_data_change="continue") == 0
    assert run.encoded() == 0


def test_a_picture_without_a_mask_stops_the_run_before_anything_is_loaded(
    run: Way, capsys: Captured
) -> None:
    (run.root / "masks/a_picture_number_3.webp").unlink()
    assert run.train() == 3
    said = capsys.readouterr().err
    assert "1 of 8 pictures cannot be used\n  a_picture_number_3.png: no mask in masks" in said

    run.dataset["allow_excluded"] = True
    run.settings.pop("max_train_steps")
    assert run.train(num_train_epochs=1) == 0
    assert json.loads((run.out / "run.json").read_text())["result"]["samples_seen"] == 7


def break_off(run: Way, mask: Path) -> bytes:
    """Cut the pixels of a mask off; returns the whole file."""
    with Image.open(mask.with_suffix(".webp")) as image:
        size = image.size
    mask.with_suffix(".webp").unlink()
    Image.effect_noise(size, 50).save(mask)
    whole = mask.read_bytes()
    mask.write_bytes(whole[: len(whole) // 2])
    # Old enough to be believed, and not of the age of another test's in the shared cache.
    os.utime(mask, (then := time.time() - 1000, then))
    return whole


def test_a_mask_that_breaks_off_is_found_before_anything_is_encoded(
    run: Way, capsys: Captured
) -> None:
    whole = break_off(run, mask := run.root / "masks/a_picture_number_2.png")
    for path in mask.parent.iterdir():
        os.utime(path, (1_700_000_000, 1_700_000_000))

    def decoded() -> list[int]:
        found = [event for event in run.events("stage") if event["stage"] == "masks masks"]
        return [event["total"] for event in found if event["state"] == "finished"]

    said = "its mask a_picture_number_2.png: cannot be decoded"
    for _ in range(2):
        assert run.train() == 3
        heard = capsys.readouterr().err
        assert f"1 of 8 pictures cannot be used\n  a_picture_number_2.png: {said}" in heard
        assert "give each a whole mask of its path and shape, or set allow_excluded" in heard
        assert decoded() == [8]  # the second start knows

    run.dataset["allow_excluded"] = True
    run.settings.pop("max_train_steps")
    assert run.train(num_train_epochs=1) == 0
    assert json.loads((run.out / "run.json").read_text())["result"]["samples_seen"] == 7
    assert decoded() == [8]

    mask.write_bytes(whole)
    assert run.train(num_train_epochs=1, resume_from_checkpoint="none") == 0
    assert json.loads((run.out / "run.json").read_text())["result"]["samples_seen"] == 8
    assert decoded() == [8, 1]


def test_pictures_whose_masks_break_off_are_left_out_by_name(run: Way) -> None:
    """Also where others come in for them, and where one folder has the masks of two datasets."""
    for number in range(4):
        break_off(run, run.root / f"masks/a_picture_number_{number}.png")
    run.dataset |= {"allow_excluded": True, "max_num_samples": 3, "resolution": [64, 80]}
    run.settings.pop("max_train_steps")
    assert run.train(num_train_epochs=1) == 0
    assert json.loads((run.out / "run.json").read_text())["result"]["samples_seen"] == 6
    left_out = [
        said for said in run.notices().split("dataset ") if "repair what goes with them" in said
    ]
    assert any("its mask a_picture_number_" in said for said in left_out)


def test_verify_names_a_mask_that_breaks_off(run: Way, capsys: Captured) -> None:
    whole = break_off(run, mask := run.root / "masks/a_picture_number_2.png")
    assert main(["data", "verify", "--config", str(run.write())]) == 3
    said = capsys.readouterr().out
    name = "a_picture_number_2.png"
    assert f"pictures: {name}: dataset masks: {name} cannot be decoded" in said

    mask.write_bytes(whole)  # the picture itself was not blamed
    assert main(["data", "verify", "--config", str(run.write())]) == 0


def test_pictures_to_be_kept_are_trained_towards_the_base(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, kinds = Stepper.step, []

    def seen(self: Stepper, number: int, window: Any) -> Outcome:
        kinds.append({batch.regularises for _, batch in window})
        return step(self, number, window)

    monkeypatch.setattr(Stepper, "step", seen)
    run = bench.fresh(tmp_path)
    kept = {"id": "kept", "instance_data_dir": str(make_pictures(tmp_path / "kept", 6))}
    words = {"caption_strategy": "instanceprompt", "instance_prompt": "a thing"}
    run.more = [{**run.dataset, **kept, **words, "is_regularization_data": True}]
    run.dataset |= {**words, "instance_prompt": "sks thing"}
    del run.settings["max_train_steps"]

    assert run.train(num_train_epochs=2, train_batch_size=1) == 0

    losses = run.losses()
    assert [kind == {True} for kind in kinds].count(True) == 2 * 6
    first_learned = kinds.index({False})
    for number, (loss, kind) in enumerate(zip(losses, kinds, strict=True)):
        assert (loss == 0) == (kind == {True} and number < first_learned)
        if kind == {True}:
            assert loss < min(
                loss for loss, kind in zip(losses, kinds, strict=True) if not all(kind)
            )
    assert run.train(num_train_epochs=2, train_batch_size=1, resume_from_checkpoint="none") == 0
    assert run.losses()[len(losses) :] == losses
