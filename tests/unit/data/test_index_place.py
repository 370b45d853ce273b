"""An index is of one folder: another with equal names, sizes and times is looked at anew."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from simpletuner.core.events import Bus
from simpletuner.data.index import Index
from simpletuner.data.storage.local import LocalStorage


def made(folder: Path, colour: str, caption: str) -> LocalStorage:
    folder.mkdir()
    Image.new("RGB", (64, 64), colour).save(folder / "1.bmp")
    (folder / "1.txt").write_text(caption)
    for file in folder.iterdir():
        os.utime(file, (1_000_000_000, 1_000_000_000))
    return LocalStorage(folder)


def test_another_folder_under_the_same_id_is_looked_at_anew(tmp_path) -> None:
    red = made(tmp_path / "red", "red", "a red")
    blue = made(tmp_path / "blue", "blue", "a blu")
    assert red.facts("1.bmp") == blue.facts("1.bmp")
    file = tmp_path / "index.parquet"

    def scanned(storage: LocalStorage) -> dict:
        index = Index(file, storage, workers=1, bus=Bus(), title="t")
        return index.scan(texts=True).to_pylist()[0]

    first, second, again = scanned(red), scanned(blue), scanned(red)
    assert (first["caption"], second["caption"], again["caption"]) == ("a red", "a blu", "a red")
    assert first["content"] != second["content"]
    assert first["content"] == again["content"]


def test_a_link_to_itself_is_a_picture_that_cannot_be_read(tmp_path) -> None:
    storage = made(tmp_path / "red", "red", "a red")
    (tmp_path / "red" / "loop.png").symlink_to("loop.png")
    index = Index(tmp_path / "index.parquet", storage, workers=1, bus=Bus(), title="t")
    found = {row["path"]: row["status"] for row in index.scan(texts=False).to_pylist()}
    assert found == {"1.bmp": "ok", "loop.png": "reject"}
