from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from simpletuner.core.errors import DataError, TrainingError
from simpletuner.core.files import (
    RunFolder,
    publish_folder,
    sweep,
    write_bytes,
    write_through,
    writing,
)


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_file_has_the_rights_of_the_users_umask_whatever_the_library_that_wrote_it_gave(
    tmp_path: Path, umask: None
) -> None:
    def secretly(path: Path) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))

    write_through(tmp_path / "file", secretly)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"old")

    def half(path: Path) -> None:
        path.write_bytes(b"ne")
        path.with_name("what the library makes for itself").write_bytes(b"n")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_through(tmp_path / "file", half)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_folder_takes_the_place_of_another_or_leaves_it_where_it_was(tmp_path: Path) -> None:
    final = tmp_path / "checkpoint-2"
    (final / "old").mkdir(parents=True)
    with pytest.raises(FileNotFoundError):
        publish_folder(tmp_path / "nowhere", final)
    assert [path.name for path in final.iterdir()] == ["old"]
    (tmp_path / "new" / "new").mkdir(parents=True)
    publish_folder(tmp_path / "new", final)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert [path.name for path in final.iterdir()] == ["new"]


def test_only_what_a_kill_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".file.0123abcd.tmp").mkdir()
    kept = [".mine.tmp", "notes.tmp", "file"]
    for name in kept:
        (tmp_path / name).mkdir()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


def test_a_disk_that_refuses_names_the_folder_and_the_room_there(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught, RunFolder(tmp_path).writing("checkpoint-2"):
        raise OSError(28, "No space left on device")
    assert caught.value.message == (
        f"checkpoint-2 cannot be written to {tmp_path}: No space left on device"
    )
    assert caught.value.fix is not None
    assert "GB are free there" in caught.value.fix


def test_a_file_where_a_folder_should_be_is_named_instead_of_the_room(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("mine")
    folder = tmp_path / "cache" / "index"
    with pytest.raises(DataError) as caught, writing(DataError, "a.parquet", folder, "make room"):
        folder.mkdir(parents=True)
    said = str(caught.value.fix)
    assert f"{tmp_path / 'cache'} is a file: move it, or name another folder" in said
    assert (tmp_path / "cache").read_text() == "mine"
