"""`kill -9` at what changes the disk: nothing complete is lost, nothing half is taken for whole."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.faults.forks import (
    Ended,
    assert_whole,
    checkpoints,
    encoded_at_start,
    leavings,
    newest_step,
    sealed_keys,
)
from tests.faults.points import plain
from tests.faults.small import CAPTIONS, CHAIN, LATENTS, Small, SmallRun, kind

KILLED = -signal.SIGKILL


class Progress:
    """What a folder holds that must never be lost."""

    def __init__(self, run: SmallRun) -> None:
        self.run = run
        self.step = 0
        self.text: set[str] = set()
        self.latents: set[str] = set()
        self.lines = 0

    def look(self) -> None:
        """After a start that ended somehow: no less than before, nothing half, nothing twice."""
        if not (self.run.out / "events.jsonl").exists():  # so early
            assert (self.step, self.text, self.latents) == (0, set(), set())
            return
        assert_whole(self.run.out)
        told = self.run.events()[self.lines :]
        for stage, total, before in (
            ("text embeddings", CAPTIONS, self.text),
            ("latents", LATENTS, self.latents),
        ):
            encoded = encoded_at_start(told, stage)
            assert encoded in (None, total - len(before)), stage
        steps = [event["step"] for event in told if event["event"] == "step"]
        assert not steps or steps[0] == self.step + 1
        text, latents = (sealed_keys(self.run.out / "cache" / kind) for kind in ("text", "vae"))
        step = newest_step(self.run.out)
        assert step >= self.step
        assert text >= self.text
        assert latents >= self.latents
        self.step, self.text, self.latents = step, text, latents
        self.lines += len(told)


def assert_as_unbroken(small: Small, run: SmallRun, ended: Ended) -> None:
    assert ended.code == 0, ended.output
    assert run.weights == small.straight.weights
    assert newest_step(run.out) == 4
    assert checkpoints(run.out) == ["checkpoint-4"]  # the limit is one
    assert leavings(run.out) == []


def test_a_run_killed_over_and_over_loses_nothing_and_ends_as_the_unbroken_one(
    small: Small,
) -> None:
    run = small.fresh()
    progress = Progress(run)
    for what, path, at in CHAIN:
        ended = small.forks.train(run, {"act": "kill", "what": what, "path": path, "at": at})
        assert ended.code == KILLED, f"{what} {path} {at} was not met\n{ended.output}"
        progress.look()
    ended = small.forks.train(run)
    progress.look()
    assert_as_unbroken(small, run, ended)


def test_one_point_of_every_kind_is_killed(small: Small) -> None:
    there = {kind(what, plain(path)) for what, path in (p.split(" ", 1) for p in small.points)}
    struck = {kind(what, path) for what, path, _ in CHAIN}
    assert sorted(there - struck) == []  # add them to CHAIN
    assert sorted(struck - there) == []


def test_a_kill_in_the_rotation_leaves_the_new_checkpoint_and_the_old_one_goes(
    small: Small,
) -> None:
    for what, path in (
        ("rename", "checkpoint-4.removing"),
        ("unlink", "checkpoint-4.removing/FILE"),
        ("rmdir", "checkpoint-4.removing"),
    ):
        run = small.copy()
        plan = {"act": "kill", "what": what, "path": path, "at": 1}
        ended = small.forks.train(run, plan, max_train_steps=6)
        assert ended.code == KILLED, ended.output
        old = "checkpoint-4" if what == "rename" else "checkpoint-4.removing"
        assert checkpoints(run.out) == [old, "checkpoint-6"]
        assert newest_step(run.out) == 6
        assert_whole(run.out)
        ended = small.forks.train(run, max_train_steps=6)
        assert ended.code == 0, ended.output
        assert checkpoints(run.out) == ["checkpoint-6"]


@pytest.mark.parametrize(
    ("what", "path"),
    [
        ("half", "benchmarks/base_model/validation_0_64x96.png"),
        ("fsync", "benchmarks/base_model"),  # the picture has its name, its recipe is not begun
        ("half", "before_after.png"),
        ("fsync", "before_after.png"),
    ],
)
def test_a_kill_among_the_last_pictures_leaves_them_to_the_next_start(
    small: Small, what: str, path: str
) -> None:
    run, sheet = small.fresh(), "before_after.png"
    plan = {"act": "kill", "what": what, "path": path, "at": 1}
    ended = small.forks.train(run, plan, disable_benchmark=False)
    assert ended.code == KILLED, ended.output
    assert_whole(run.out)
    assert [Path(left).parent for left in leavings(run.out)] == [(run.out / path).parent] * (
        path.endswith(".png")
    )
    assert not (run.out / sheet).exists()
    ended = small.forks.train(run, disable_benchmark=False)
    assert_as_unbroken(small, run, ended)
    assert_whole(run.out)
    made = [
        Path(file).relative_to(run.out) for file in run.events("validation.images")[-1]["images"]
    ]
    assert [str(file) for file in made] == [
        "validation_images/step_4_validation_0_64x96.png",
        "benchmarks/base_model/validation_0_64x96.png",
        sheet,
    ]
    assert all((run.out / file).is_file() for file in made)


@pytest.mark.slow
@pytest.mark.skipif(
    "EVERY_POINT" not in os.environ, reason="EVERY_POINT=1 goes from the first: minutes"
)
def test_a_kill_at_any_point_loses_nothing_and_the_restart_ends_as_the_unbroken_run(
    small: Small,
) -> None:
    for at in range(int(os.environ["EVERY_POINT"]), len(small.points) + 1):
        run = small.fresh()
        progress = Progress(run)
        ended = small.forks.train(run, {"act": "kill", "at": at})
        assert (ended.code, len(ended.points)) == (KILLED, at), ended.output
        if run.out.exists():
            progress.look()
        ended = small.forks.train(run)
        progress.look()
        assert_as_unbroken(small, run, ended)
