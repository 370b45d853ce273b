"""The output folder of a run: one writer, nothing half written, nothing left lying about."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner.core.errors import ConfigError, TrainingError
from simpletuner.core.files import RunFolder

_HOLD = """
import sys
from pathlib import Path
from simpletuner.core.files import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    with first.locked():
        with (
            pytest.raises(ConfigError, match="another run is writing to") as error,
            second.locked(),
        ):
            pytest.fail("two runs have one folder")
        assert error.value.exit_code == 2
        assert error.value.fix == "wait for it or stop it, or set another output_dir"
        with RunFolder(tmp_path.parent).locked():
            pass  # another folder is free
    with second.locked():
        pass
    with pytest.raises(KeyError), first.locked():
        raise KeyError
    with second.locked():
        pass


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLD, str(tmp_path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    with (
        pytest.raises(ConfigError, match="another run is writing to"),
        RunFolder(tmp_path).locked(),
    ):
        pytest.fail("two processes have one folder")
    other.kill()
    other.communicate()
    with RunFolder(tmp_path).locked():
        pass


def test_what_is_looked_at_first_takes_its_place_or_is_gone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "result").write_text("old")

    def stage(text: str) -> None:
        with folder.staging() as staging:
            (staging / "result").write_text(text)
            (staging / "rest").write_text("…")
            if text == "bad":
                raise TrainingError("it is not what it should be")
            (staging / "result").replace(tmp_path / "result")

    with pytest.raises(TrainingError):
        stage("bad")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert (tmp_path / "result").read_text() == "old"
    stage("new")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert (tmp_path / "result").read_text() == "new"


def test_a_disk_that_refuses_says_how_to_go_on_from_what_is_saved(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught, RunFolder(tmp_path).writing("the weights"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert f"the weights cannot be written to {tmp_path}: No space left" in str(caught.value)
    assert str(caught.value).endswith(
        "GB are free there: make room, or set output_dir to another disk and copy the folder there;"
        " then start again; resume_from_checkpoint=latest, the default, resumes from the last"
        " checkpoint if there is one"
    )


def test_sweeping_removes_what_kills_leave_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    kept = ["checkpoint-2/a", "previous-1/checkpoint-4/a", ".cache.tmp/a", "mine.partial/a"]
    left = [
        ".staging.0a1b2c3d.tmp/a",
        ".run.json.0a1b2c3d.tmp/a",
        "checkpoint-4.partial/a",
        "checkpoint-1.removing/a",
        "validation_images/.x.png.0a1b2c3d.tmp/a",
    ]
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    folder.sweep()
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == set(kept)
    RunFolder(tmp_path / "nowhere").sweep()
