"""Where a run starts: over, at a checkpoint of its own or another's, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.tiny.build import build_sdxl
from tests.ways import WEIGHTS, Bench, tree

Captured = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


# --- where a run starts ------------------------------------------------------------------------


def test_none_starts_over_and_the_next_start_goes_on_with_the_new_run(
    bench: Bench, tmp_path: Path
) -> None:
    run = bench.copy(tmp_path)
    old = {name: tree(run.out / name) for name in ("checkpoint-2", "checkpoint-4")}
    new = {"checkpoints_total_limit": 1, "seed": 7}
    assert run.train(**new, max_train_steps=3, resume_from_checkpoint="none") == 0
    assert run.steps() == [1, 2, 3, 4, 1, 2, 3]
    assert "checkpoint-2, checkpoint-4 of an earlier run moved to previous-1/" in run.notices()
    assert run.names() == {"checkpoint-3", "previous-1"}
    assert {path.name: tree(path) for path in (run.out / "previous-1").iterdir()} == old

    assert run.train(**new, max_train_steps=2, resume_from_checkpoint="none") == 0
    assert "checkpoint-3 of an earlier run moved to previous-2/" in run.notices()
    assert run.names() == {"checkpoint-2", "previous-1", "previous-2"}
    assert [path.name for path in (run.out / "previous-2").iterdir()] == ["checkpoint-3"]

    assert run.train(**new, max_train_steps=3) == 0
    assert run.events("run.started")[-1]["summary"]["resumed"] == "checkpoint-2, 2 steps done"
    assert run.steps()[7:] == [1, 2, 3]
    assert run.names() == {"checkpoint-3", "previous-1", "previous-2"}


@pytest.mark.parametrize("way", ["name", "path"])
def test_a_named_checkpoint_is_resumed_bit_for_bit_and_later_ones_are_moved_aside(
    bench: Bench, tmp_path: Path, way: str
) -> None:
    run = bench.copy(tmp_path)
    before = tree(run.out / "checkpoint-4")
    (run.out / WEIGHTS).unlink()
    wanted = "checkpoint-2" if way == "name" else str(run.out / "checkpoint-2")
    assert run.train(resume_from_checkpoint=wanted) == 0
    assert run.steps() == [1, 2, 3, 4, 3, 4]
    assert run.losses()[4:] == run.losses()[2:4]
    assert run.names() == {"checkpoint-2", "checkpoint-4", "previous-1"}
    assert tree(run.out / "previous-1") == {f"checkpoint-4/{n}": d for n, d in before.items()}
    assert tree(run.out / "checkpoint-4") == before
    assert (run.out / WEIGHTS).read_bytes() == (bench.done.out / WEIGHTS).read_bytes()
    assert "checkpoint-4 of an earlier run moved to previous-1/" in run.notices()


@pytest.mark.parametrize("sampling", ["auto-weighting", "mix"])
def test_phases_shares_and_own_batch_sizes_are_resumed_bit_for_bit(
    bench: Bench, tmp_path: Path, sampling: str
) -> None:
    settings = {
        "gradient_accumulation_steps": 2,
        "data_backend_sampling": sampling,
        "lr_scheduler": "constant",
    }
    whole, cut = (bench.fresh(tmp_path / name) for name in ("whole", "cut"))
    for run in (whole, cut):
        late = {"id": "late", "start_step": 4, "train_batch_size": 3, "repeats": 1}
        run.more = [run.dataset | late, run.dataset | {"id": "early", "end_step": 6}]

    assert whole.train(**settings, max_train_steps=9) == 0
    for steps in (5, 9):  # in the phase of all three, then to the end
        assert cut.train(**settings, max_train_steps=steps) == 0

    assert cut.losses() == whole.losses()
    assert (cut.out / WEIGHTS).read_bytes() == (whole.out / WEIGHTS).read_bytes()
    told = [event["samples"] for event in whole.events("step")]
    assert max(told) > 4  # a window with a batch of three


def test_a_checkpoint_of_another_folder_is_resumed_and_stays_as_it_is(
    bench: Bench, tmp_path: Path
) -> None:
    run, other = bench.fresh(tmp_path), bench.done.out / "checkpoint-2"
    before = tree(bench.done.out)
    assert run.train(resume_from_checkpoint=str(other)) == 0
    assert run.losses() == bench.done.losses()[2:]
    assert tree(run.out / "checkpoint-4") == tree(bench.done.out / "checkpoint-4")
    assert tree(bench.done.out) == before


# --- what a checkpoint is not resumed with -----------------------------------------------------


def another(part: str, model: Path, folder: Path) -> Path:
    """A copy of `model` with other weights in one of its parts."""
    build_sdxl(folder / "donor", seed=1)
    shutil.copytree(model, folder / "model")
    shutil.rmtree(folder / "model" / part)
    shutil.copytree(folder / "donor" / part, folder / "model" / part)
    return folder / "model"


@pytest.mark.parametrize(
    "change", ["lora_alpha", "base model", "prediction_type", "VAE", "optimizer"]
)
def test_another_model_is_refused_by_name(
    bench: Bench, tmp_path: Path, capsys: Captured, change: str
) -> None:
    run = bench.copy(tmp_path / "run")
    settings: dict[str, Any] = {}
    if change == "lora_alpha":
        settings["lora_alpha"] = 10
    elif change == "base model":
        settings["pretrained_model_name_or_path"] = str(another("unet", bench.model, tmp_path))
    elif change == "prediction_type":
        settings["prediction_type"] = "v_prediction"
    elif change == "optimizer":
        settings["optimizer"] = "torch-adamw"
    else:
        model = another("vae", bench.model, tmp_path)
        settings["pretrained_vae_model_name_or_path"] = str(model / "vae")
    before = tree(run.out / "checkpoint-4")
    assert run.train(max_train_steps=5, on_data_change="continue", **settings) == 7
    message = capsys.readouterr().err
    assert f"this run cannot go on from the checkpoint: {change} changed" in message
    assert "resume_from_checkpoint=none" in message
    assert run.names() == {"checkpoint-2", "checkpoint-4"}
    assert tree(run.out / "checkpoint-4") == before
    assert run.steps() == [1, 2, 3, 4]


@pytest.mark.parametrize("change", ["a caption", "caption_dropout_probability"])
def test_other_captions_are_refused_by_name_unless_told_to_go_on(
    bench: Bench, tmp_path: Path, capsys: Captured, change: str
) -> None:
    run = bench.copy(tmp_path)
    if change == "a caption":
        shutil.copytree(bench.pictures, tmp_path / "pictures")
        run.dataset["instance_data_dir"] = str(tmp_path / "pictures")
        picture = tmp_path / "pictures" / "a_picture_number_0.png"
        assert run.train() == 0  # another folder alone changes nothing
        picture.rename(picture.with_name("another_caption.png"))
    else:
        run.dataset["caption_dropout_probability"] = 0.5
    assert run.train(max_train_steps=5) == 3
    message = capsys.readouterr().err
    assert "trained on other data: dataset pictures: captions changed" in message
    assert "--on_data_change continue" in message
    assert run.train(max_train_steps=5, on_data_change="continue") == 0
    assert "pictures: captions changed since the checkpoint; going on" in run.notices()
    assert run.steps() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("dataset", "settings", "told"),
    [
        ({"crop_style": "corner"}, {}, "dataset pictures: crop_style changed (was random, now"),
        ({}, {"vae_enable_tiling": True}, "vae_enable_tiling changed (was false, now true)"),
        ({}, {"train_batch_size": 1}, "train_batch_size changed (was 2, now 1)"),
    ],
)
def test_pictures_that_would_be_others_are_refused_by_name(
    bench: Bench,
    tmp_path: Path,
    capsys: Captured,
    dataset: Mapping[str, Any],
    settings: Mapping[str, Any],
    told: str,
) -> None:
    run = bench.copy(tmp_path)
    run.dataset |= dataset
    assert run.train(max_train_steps=5, **settings) == 3
    message = capsys.readouterr().err
    assert told in message
    assert ("on other data" in message) == bool(dataset)
    assert run.steps() == [1, 2, 3, 4]


def test_another_learning_rate_and_schedule_are_resumed_with_and_told_once(
    bench: Bench, tmp_path: Path
) -> None:
    run = bench.copy(tmp_path)
    before = len(run.events("notice"))
    assert run.train(max_train_steps=6, learning_rate=1e-4, lr_scheduler="constant") == 0
    assert [event["lr"] for event in run.events("step")[4:]] == [1e-4, 1e-4]
    told = [e["text"] for e in run.events("notice")[before:] if "since the checkpoint" in e["text"]]
    assert told == [
        "changed since the checkpoint: learning_rate: was 0.001, now 0.0001; lr_end: was 4e-07, now"
        " unused; lr_num_cycles: was 1, now unused; lr_scheduler: was cosine, now constant;"
        " lr_warmup_steps: was 0, now unused; total steps: was 4, now unused"
    ]


def test_more_steps_under_a_schedule_that_falls_say_that_the_rate_jumps(
    bench: Bench, tmp_path: Path
) -> None:
    run = bench.copy(tmp_path)
    assert run.train(max_train_steps=6) == 0
    assert "total steps: was 4, now 6; cosine depends on the total steps:" in run.notices()
