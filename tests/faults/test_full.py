"""A full disk at what writes: the right exit code, the way out, and nothing complete is lost."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import pytest

from simpletuner.core.errors import RESUME
from tests.faults.forks import Ended, assert_whole, leavings, newest_step, sealed_keys
from tests.faults.points import GROWING, plain
from tests.faults.small import CHAIN, Small, SmallRun

PICTURES = "validation_images"
FILLING = [
    (what, path, at)
    for what, path, at in CHAIN
    if what in ("create", "half") or (what == "fsync" and not path.startswith(PICTURES))
]
"""Names take no room, and half a write is one that was begun. Pictures end no run: half of one of
each kind is enough."""

LET_GO = re.compile(rf"fsync cache|\w+ (cache/digests\.json|{PICTURES}.*|.*\.removing.*)")
"""What is not needed to go on: that it cannot be written or removed ends no run."""

SAID = (
    (r"\.", 2, "output_dir {out} cannot be made"),
    (r"\.lock|run\.json|resolved_config\.json", 7, "{0} cannot be written to {out}"),
    (r"cache|cache/index", 4, "one.parquet cannot be written to {out}/cache/index"),
    (r"cache/index/(.+)", 4, "{1} cannot be written to {out}/cache/index"),
    (r"cache/text.*", 4, "the cache in {out}/cache/text/{family} cannot be written"),
    (r"cache/vae/FAMILY/(\w+).*", 4, "the cache in {out}/cache/vae/{family}/{1} cannot be written"),
    (r"cache/vae.*", 4, "the cache in {out}/cache/vae/{family}/two cannot be written"),
    (r"(checkpoint-\d+).*", 7, "{1} cannot be written to {out}"),
    (r"staging.*|pytorch_lora_weights\.safetensors", 7, "the weights cannot be written to {out}"),
)
"""The exit code and the message by the `plain` path that the disk refused."""


def refused(points: Sequence[str], struck: int) -> str | None:
    """The path a start ended at, given the points it passed and the one from which it was full.

    What is let go is not it: the next thing that takes room is. The flush of a folder's names is
    one of the name given last.
    """
    passed = [(what, plain(path)) for what, path in (point.split(" ", 1) for point in points)]
    for number, (what, path) in enumerate(passed[struck:], struck):
        if what in ("rmdir", "unlink") or (what not in GROWING and number > struck):
            continue
        pack = ("rename", path.replace(".parquet", ".safetensors"))
        rebuilt = path.endswith("/PACK.parquet") and pack not in passed[:number]
        if not rebuilt and not LET_GO.fullmatch(f"{what} {path}"):
            named = what == "fsync" and path in (".", "cache/index")
            return passed[number - 1][1] if named else path
    return None


def expected(small: Small, run: SmallRun, path: str | None) -> tuple[int, str]:
    """The exit code for a disk that refused this path, and what is said of it."""
    if path is None:
        return 0, "verified"
    for pattern, code, said in SAID:
        if match := re.fullmatch(pattern, path):
            names = {"out": run.out, "family": small.family}
            return code, said.format(match[0], *match.groups(), **names)
    raise AssertionError(f"nothing is known to be said of {path}")


def assert_told(small: Small, run: SmallRun, ended: Ended, struck: int) -> None:
    """The run ended as it should on a disk that was full from this point on."""
    path = refused(ended.points, struck)
    code, said = expected(small, run, path)
    point = f"full at {ended.points[struck]}, refused {path}\n{ended.output}"
    assert ended.code == code, point
    assert said in ended.output, point
    assert "Traceback" not in ended.output, point
    if code in (4, 7):
        assert f"{said}: No space left on device" in ended.output, point
        assert "GB are free there" in ended.output, point
        assert "start again" in ended.output, point
    if run.out.exists():
        assert_whole(run.out)
        if not ended.points[struck].startswith(("rmdir", "unlink")):
            assert leavings(run.out) == [], point


def full_at(small: Small, run: SmallRun, what: str, path: str, at: int) -> None:
    """A start on a disk that is full from this point on."""
    step = newest_step(run.out)
    sealed = sealed_keys(run.out / "cache")
    ended = small.forks.train(run, {"act": "full", "what": what, "path": path, "at": at})
    passed = [tuple(point.split(" ", 1)) for point in ended.points]
    met = [n for n, (did, where) in enumerate(passed) if (did, plain(where)) == (what, path)]
    assert len(met) >= at, f"{what} {path} {at} was not met\n{ended.output}"
    assert_told(small, run, ended, met[at - 1])
    assert newest_step(run.out) >= step
    assert sealed_keys(run.out / "cache") >= sealed


def test_a_disk_full_over_and_over_loses_nothing_and_the_run_ends_as_the_unbroken_one(
    small: Small,
) -> None:
    run = small.fresh()
    for what, path, at in FILLING:
        full_at(small, run, what, path, at)
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


@pytest.mark.parametrize(
    ("only", "steps"),
    [("resolved_config.json", 0), ("checkpoint-4.partial", 2)],
    ids=["before the first step", "after a checkpoint"],
)
def test_a_run_that_starts_over_goes_on_as_a_full_disk_advises(
    small: Small, only: str, steps: int
) -> None:
    run = small.fresh()
    full = {"act": "full", "what": "mkdir", "only": only, "at": 1}
    ended = small.forks.train(run, full, resume_from_checkpoint="none")
    assert ended.code == 7, ended.output
    assert f"; then start again; {RESUME} if there is one" in ended.output
    lines = len(run.events("step"))
    ended = small.forks.train(run, resume_from_checkpoint="latest")
    assert ended.code == 0, ended.output
    assert run.events("step")[lines]["step"] == steps + 1
    assert not list(run.out.glob("previous-*"))
    assert run.weights == small.straight.weights


@pytest.mark.slow
@pytest.mark.skipif(
    "EVERY_POINT" not in os.environ, reason="EVERY_POINT=1 goes from the first: minutes"
)
def test_a_disk_full_at_any_point_is_told_and_the_restart_ends_as_the_unbroken_run(
    small: Small,
) -> None:
    for at in range(int(os.environ["EVERY_POINT"]), len(small.points) + 1):
        run = small.fresh()
        ended = small.forks.train(run, {"act": "full", "at": at})
        assert_told(small, run, ended, at - 1)
        ended = small.forks.train(run)
        assert ended.code == 0, f"{at} {small.points[at - 1]}\n{ended.output}"
        assert run.weights == small.straight.weights
        assert leavings(run.out) == []
