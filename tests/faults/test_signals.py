"""An order to leave around a validation, and a cache that cannot be read: what is done is saved."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.faults.forks import Ended, assert_whole, leavings, newest_step
from tests.faults.small import Small, SmallRun
from tests.faults.test_damage import flip_a_byte

THREE = {"num_validation_images": 3}
TERMINATED = 128 + signal.SIGTERM


def told_to_leave(small: Small, run: SmallRun, what: str, only: str, **settings: Any) -> Ended:
    """A run that gets a SIGTERM at the first such point."""
    plan = {"act": "signals", "signals": [signal.SIGTERM], "what": what, "only": only, "at": 1}
    ended = small.forks.train(run, plan, **settings)
    assert_whole(run.out)
    return ended


def after(points: Sequence[str], what: str, only: str) -> list[str]:
    """The checkpoints and pictures that got their names after the first such point, in order."""
    first = next(
        i for i, point in enumerate(points) if point.startswith(f"{what} ") and only in point
    )
    named = [point.split(" ", 1) for point in points[first:]]
    return [
        Path(path).name
        for done, path in named
        if (done == "rename" and re.fullmatch(r"checkpoint-\d+", path))
        or (done == "replace" and path.endswith(".png"))
    ]


def notices(run: SmallRun) -> str:
    return "\n".join(event["text"] for event in run.events("notice"))


def pictures(run: SmallRun) -> list[str]:
    return sorted(path.name for path in run.out.glob("validation_images/*.png"))


def assert_ends_as_the_unbroken_one(small: Small, run: SmallRun, **settings: Any) -> None:
    ended = small.forks.train(run, **settings)
    assert ended.code == 0, ended.output
    assert run.weights == small.straight.weights
    assert leavings(run.out) == []


# --- an order to leave -------------------------------------------------------------------------


def test_a_signal_before_a_validation_saves_and_renders_nothing(small: Small) -> None:
    run, first = small.fresh(), ("create", "cache/vae")
    settings = {"vae_cache_ondemand": True, "validation_step_interval": 1}
    ended = told_to_leave(small, run, *first, **settings)  # while the first window is read
    assert ended.code == TERMINATED, ended.output
    assert "stopped by SIGTERM after step 1 of 4; it is saved" in ended.output
    assert after(ended.points, *first) == ["checkpoint-1"]
    assert pictures(run) == []
    assert "validation after step 1 ended with 0 of 1 pictures: the run was asked" in notices(run)
    assert_ends_as_the_unbroken_one(small, run, **settings)


def test_a_signal_while_a_checkpoint_is_written_leaves_out_the_validation_due_with_it(
    small: Small,
) -> None:
    run, saving = small.fresh(), ("write", "checkpoint-2.partial/.trainable")
    ended = told_to_leave(small, run, *saving, validation_step_interval=2)
    assert ended.code == TERMINATED, ended.output
    assert after(ended.points, *saving) == ["checkpoint-2"]  # once
    assert pictures(run) == []
    assert_ends_as_the_unbroken_one(small, run, validation_step_interval=2)


@pytest.mark.parametrize(
    ("only", "current"),
    [
        ("step_3_validation_0_64x96.png", ["step_3_validation_0_64x96.png"]),
        ("step_3_validation_0_64x96.json", []),
    ],
    ids=["picture", "recipe"],
)
def test_a_signal_during_a_validation_ends_it_after_the_current_picture_and_saves(
    small: Small, only: str, current: list[str]
) -> None:
    run = small.fresh()
    ended = told_to_leave(small, run, "fsync", only, **THREE)
    assert ended.code == TERMINATED, ended.output
    assert "stopped by SIGTERM after step 3 of 4; it is saved" in ended.output
    assert after(ended.points, "fsync", only) == [*current, "checkpoint-3"]
    assert pictures(run) == ["step_3_validation_0_64x96.png"]
    assert (run.out / "validation_images/step_3_validation_0_64x96.json").is_file()
    (told,) = run.events("validation.images")
    assert [Path(path).name for path in told["images"]] == pictures(run)
    assert "validation after step 3 ended with 1 of 3 pictures" in notices(run)
    assert_ends_as_the_unbroken_one(small, run, **THREE)


def test_a_signal_in_the_last_checkpoint_leaves_the_pictures_to_the_next_start(
    small: Small,
) -> None:
    run, saving = small.fresh(), ("write", "checkpoint-4.partial/.trainable")
    settings = {"disable_benchmark": False, "validation_step_interval": 0}
    sheet = run.out / "before_after.png"
    run.out.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(sheet)  # of an earlier run
    ended = told_to_leave(small, run, *saving, **settings)
    assert ended.code == 0, ended.output  # no step is left to do
    assert after(ended.points, *saving) == ["checkpoint-4"]
    assert "validation after step 4 ended with 0 of 2 pictures" in notices(run)
    assert "before_after.png is missing, the next start makes it" in notices(run)
    assert not sheet.exists()
    assert run.weights == small.straight.weights
    assert_ends_as_the_unbroken_one(small, run, **settings)
    assert sheet.exists()


def test_a_signal_in_the_last_validation_comes_after_the_checkpoint_and_ends_it(
    small: Small,
) -> None:
    run, base = small.fresh(), ("fsync", "base_model/.validation_0_64x96.png")
    ended = told_to_leave(small, run, *base, **THREE, disable_benchmark=False)
    assert ended.code == 0, ended.output
    assert after(ended.points, "rename", "checkpoint-4") == [
        "checkpoint-4",
        *(f"step_4_validation_{number}_64x96.png" for number in range(3)),
        "validation_0_64x96.png",
    ]
    assert "validation after step 4 ended with 4 of 6 pictures" in notices(run)
    assert "before_after.png is missing" in notices(run)
    assert not (run.out / "before_after.png").exists()
    assert run.weights == small.straight.weights


# --- a cache that cannot be read -----------------------------------------------------------------


def without_checkpoints(run: SmallRun) -> SmallRun:
    """A run that has its caches, and everything else to do."""
    for left in run.out.glob("checkpoint-*"):
        shutil.rmtree(left)
    return run


def test_a_damaged_entry_met_in_the_loop_costs_no_step(small: Small) -> None:
    """Whichever step meets it; met in the first, there is nothing to save."""
    met = set()
    for pack in sorted((small.straight.out / "cache/vae").rglob("*.safetensors")):
        run = without_checkpoints(small.copy())
        lines = len(run.events("step"))
        flip_a_byte(run.out / pack.relative_to(small.straight.out))
        ended = small.forks.train(run, checkpoint_step_interval=0)
        assert ended.code == 4, ended.output
        assert "start again: it is encoded again" in ended.output
        assert_whole(run.out)
        done = len(run.events("step")) - lines
        assert newest_step(run.out) == done
        assert (f"; step {done} of 4 is saved" in ended.output) == (done > 0)
        assert ("resumes from the last checkpoint" in ended.output) == (done > 0)
        assert "on_data_change" not in ended.output
        assert_ends_as_the_unbroken_one(small, run, checkpoint_step_interval=0)
        steps = [event["step"] for event in run.events("step")[lines:]]
        assert steps == [1, 2, 3, 4]
        met.add(done)
    assert met - {0}, "none was met after a step"


def test_a_damaged_entry_on_a_full_disk_is_named_with_what_could_not_be_saved(
    small: Small,
) -> None:
    told = []
    for pack in sorted((small.straight.out / "cache/vae").rglob("*.safetensors")):
        run = without_checkpoints(small.copy())
        flip_a_byte(run.out / pack.relative_to(small.straight.out))
        full = {"act": "full", "what": "mkdir", "only": "checkpoint-", "at": 1}
        ended = small.forks.train(run, full, checkpoint_step_interval=0)
        assert ended.code == 4, ended.output
        assert "is damaged at entry" in ended.output
        assert "is saved" not in ended.output
        assert newest_step(run.out) == 0
        told.append(f"cannot be written to {run.out}: No space left" in ended.output)
    assert any(told)
