"""A full disk at what writes: the right exit code, the way out, and nothing complete is lost."""

from __future__ import annotations

import os

import pytest

from tests.faults.forks import assert_whole, leavings, newest_step, sealed_keys
from tests.faults.small import CHAIN, Small, SmallRun

FILLING = [point for point in CHAIN if point[0] in ("create", "half", "fsync")]
"""Names take no room, and half a write is one that was begun."""


def expected(only: str) -> tuple[int, str]:
    """The exit code for a disk that is full from a point on, and what the message names."""
    if only.startswith("cache") or only == ".parquet":
        return 4, "cache"
    return 7, "out"


def full_at(small: Small, run: SmallRun, what: str, only: str, at: int) -> None:
    """A start on a disk that is full from this point on."""
    step = newest_step(run.out)
    sealed = sealed_keys(run.out / "cache")
    ended = small.forks.train(run, {"act": "full", "what": what, "only": only, "at": at})
    code, place = expected(only)
    point = f"{what} {only} {at}\n{ended.output}"
    assert ended.code == code, point
    folder = run.out / "cache" if place == "cache" else run.out
    assert str(folder) in ended.output, point
    assert "No space left on device" in ended.output, point
    assert "GB are free there" in ended.output, point
    assert "start again" in ended.output, point
    assert_whole(run.out)
    assert leavings(run.out) == [], point
    assert newest_step(run.out) >= step, point
    assert sealed_keys(run.out / "cache") >= sealed, point


def test_a_disk_full_over_and_over_loses_nothing_and_the_run_ends_as_the_unbroken_one(
    small: Small,
) -> None:
    run = small.fresh()
    for what, only, at in FILLING:
        full_at(small, run, what, only, at)
    ended = small.forks.train(run)
    assert ended.code == 0, ended.output
    assert run.weights == small.straight.weights


def test_a_checkpoint_that_the_system_refuses_leaves_the_one_before(small: Small) -> None:
    run = small.copy()
    for name in ("pytorch_lora_weights", "trainable"):
        size = (run.out / f"checkpoint-4/{name}.safetensors").stat().st_size
        limit = {"file_bytes": size - 1000}
        for log in ("events.jsonl", "simpletuner.log"):
            (run.out / log).unlink()  # or it is the log that has grown too large
        ended = small.forks.train(run, limit, max_train_steps=6, lr_scheduler="constant")
        assert ended.code == 7, ended.output
        assert f"checkpoint-6 cannot be written to {run.out}: File too large" in ended.output
        assert newest_step(run.out) == 4
        assert leavings(run.out) == []
    # so full that not even a line of the log can be written: no traceback hides what is told
    for log in ("events.jsonl", "simpletuner.log"):
        (run.out / log).write_text("\n" * 5000)
    ended = small.forks.train(run, {"file_bytes": 5000}, max_train_steps=6)
    assert ended.code == 7, ended.output
    assert ended.output.rstrip().splitlines()[-2].startswith("resolved_config.json cannot be")
    assert "Traceback" not in ended.output
    assert small.forks.train(run, max_train_steps=6).code == 0
    assert newest_step(run.out) == 6


@pytest.mark.slow
@pytest.mark.skipif(
    "EVERY_POINT" not in os.environ, reason="EVERY_POINT=1 goes from the first: minutes"
)
def test_a_disk_full_at_any_point_is_told_and_the_restart_ends_as_the_unbroken_run(
    small: Small,
) -> None:
    for number, point in enumerate(small.points, 1):
        if number < int(os.environ["EVERY_POINT"]):
            continue
        run = small.fresh()
        ended = small.forks.train(run, {"act": "full", "at": number})
        what, where = point.split(" ", 1)
        removal = what in ("rmdir", "unlink")
        code = 2 if where == "." and number == 1 else 4 if where.startswith("cache") else 7
        # A digest that cannot be kept, and a folder that cannot be removed, are no error; what is
        # written next then is, unless nothing is.
        codes = (code, 4, 7, 0) if removal or number > len(small.points) - 2 else (code,)
        if "validation" in where or where.startswith("checkpoint-2.removing"):
            codes = (7,)
        assert ended.code in codes, f"{number} {point}\n{ended.output}"
        assert "fault of the program" not in ended.output
        if run.out.exists():
            assert_whole(run.out)
        ended = small.forks.train(run)
        assert ended.code == 0, f"{number} {point}\n{ended.output}"
        assert run.weights == small.straight.weights
