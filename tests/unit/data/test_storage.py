from __future__ import annotations

import os
from pathlib import Path

import pytest

from simpletuner.core.errors import DataError
from simpletuner.data.storage.base import FileFacts
from simpletuner.data.storage.local import LocalStorage


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_pictures_are_found_at_any_depth_and_sorted(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "a/z.JPG", "a/deep/er/q.webp", "a/notes.txt", "a/song.mp3", "C.jpeg")
    assert LocalStorage(tmp_path).keys() == ["C.jpeg", "a/deep/er/q.webp", "a/z.JPG", "b.png"]


def test_hidden_and_system_folders_are_skipped(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "ok.png",
        ".hidden.png",
        "._ok.png",
        ".ipynb_checkpoints/x.png",
        "__MACOSX/x.png",
        "$RECYCLE.BIN/x.png",
    )
    assert LocalStorage(tmp_path).keys() == ["ok.png"]


def test_links_are_followed_and_loops_cut(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    touch(data, "in/a.png")
    touch(elsewhere, "b.png")
    (data / "link").symlink_to(elsewhere)
    (data / "in" / "loop").symlink_to(data)
    (data / "c.png").symlink_to(elsewhere / "b.png")
    assert LocalStorage(data).keys() == ["c.png", "in/a.png", "link/b.png"]


def test_facts_are_size_and_time_and_none_for_nothing(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    os.utime(tmp_path / "a.png", ns=(5, 1_700_000_000_000_000_000))
    storage = LocalStorage(tmp_path)
    assert storage.facts("a.png") == FileFacts(1, 1_700_000_000_000_000_000)
    assert storage.facts("a.txt") is None
    assert storage.facts("a.png/b.txt") is None


def test_a_missing_folder_and_a_file_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "file")
    with pytest.raises(DataError, match="nowhere does not exist\n  correct instance_data_dir"):
        LocalStorage(tmp_path / "nowhere").keys()
    with pytest.raises(DataError, match="file is not a folder"):
        LocalStorage(tmp_path / "file").keys()
