"""What the data layer may count on, whatever kind of place the files of a dataset lie in.

A new storage is one more line of `STORAGES`: a function that puts some files there and opens it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.core.events import Bus
from simpletuner.data.index import Index
from simpletuner.data.storage.base import FileFacts, Storage
from simpletuner.data.storage.listed import ListedStorage
from simpletuner.data.storage.local import LocalStorage
from simpletuner.data.storage.web import Patience, WebStorage
from tests.unit.data.serving import served

Opener = Callable[[Mapping[str, bytes], Path, ExitStack], tuple[Storage, Callable[[str], str]]]
"""Opens a storage with some files; gives the key of each of their names too."""

ODD_NAMES = (
    "a b.png",
    "ünï.png",
    "猫/犬.png",
    "🐱.png",
    "100%.png",
    "q?a=1&b=2.png",
    "#1.png",
    "'.png",
)


def written(files: Mapping[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    folder.mkdir(exist_ok=True)
    return folder


def local(
    files: Mapping[str, bytes], tmp: Path, stack: ExitStack
) -> tuple[Storage, Callable[[str], str]]:
    return LocalStorage(written(files, tmp / "local")), str


def web(
    files: Mapping[str, bytes], tmp: Path, stack: ExitStack
) -> tuple[Storage, Callable[[str], str]]:
    site = stack.enter_context(served())
    urls = {name: site.put(f"/{number}/1.png", data) for number, (name, data) in enumerate_(files)}
    storage = WebStorage(urls.values(), tmp / "kept", patience=Patience(tries=1))
    return storage, lambda name: urls.get(name, f"{site.address}/{name}")


def listed(
    files: Mapping[str, bytes], tmp: Path, stack: ExitStack
) -> tuple[Storage, Callable[[str], str]]:
    """Every second file on the web."""
    items = list(files.items())
    folder, _ = local(dict(items[::2]), tmp, stack)
    pages, address = web(dict(items[1::2]), tmp, stack)
    on_web = {name for name, _ in items[1::2]}

    def key(name: str) -> str:
        return address(name) if name in on_web else name

    return ListedStorage(map(key, files), folder, pages, "a table"), key


def enumerate_(files: Mapping[str, bytes]) -> Iterator[tuple[int, tuple[str, bytes]]]:
    return iter(enumerate(files.items()))


STORAGES: Mapping[str, Opener] = {"local": local, "web": web, "listed": listed}


@pytest.fixture(params=STORAGES)
def opened(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Mapping[str, bytes]], tuple[Storage, Callable[[str], str]]]]:
    monkeypatch.setenv("no_proxy", "*")
    with ExitStack() as stack:
        yield lambda files: STORAGES[request.param](files, tmp_path, stack)


def test_it_has_a_title_and_lists_its_files_sorted(opened) -> None:
    storage, key = opened({name: b"x" for name in ("b.png", "a/z.jpg", "C.webp", "a/b/c.png")})

    keys = storage.keys()

    assert storage.title
    assert keys == sorted(keys)
    assert set(keys) == {key(name) for name in ("b.png", "a/z.jpg", "C.webp", "a/b/c.png")}
    assert storage.keys() == keys


def test_a_file_is_read_whole_and_again(opened) -> None:
    data = bytes(range(256)) * 3000
    storage, key = opened({"a.png": data, "b.png": b"\x00"})

    assert storage.read(key("a.png")) == data
    assert storage.read(key("a.png")) == data
    assert storage.read(key("b.png")) == b"\x00"


def test_what_was_read_has_facts_that_stay(opened) -> None:
    storage, key = opened({"a.png": b"four", "b.png": b"x"})
    storage.read(key("a.png"))

    facts = storage.facts(key("a.png"))

    assert facts is not None
    assert facts.size == 4
    assert facts.mtime_ns > 10**18
    assert storage.facts(key("a.png")) == FileFacts(facts.size, facts.mtime_ns)


def test_a_missing_file_has_no_facts_and_cannot_be_read(opened) -> None:
    storage, key = opened({"a.png": b"x", "b.png": b"y"})

    for name in ("none.png", "a.png/b.png", "x" * 5000 + ".png"):
        assert storage.facts(key(name)) is None
        with pytest.raises(OSError, match=r"\w"):
            storage.read(key(name))


def test_odd_names_are_names(opened) -> None:
    files = {name: name.encode() for name in ODD_NAMES}
    storage, key = opened(files)

    assert storage.keys() == sorted(map(key, files))
    assert {name: storage.read(key(name)) for name in files} == files


def test_an_index_of_it_is_read_once(opened, tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    Image.new("RGB", (3, 2)).save(picture)
    storage, key = opened({"a.png": picture.read_bytes(), "b.png": b"no picture"})
    index = Index(tmp_path / "index.parquet", storage, workers=2, bus=Bus(), title="t")

    first, second = index.scan(texts=False), index.scan(texts=False)

    assert second.equals(index.scan(texts=False))
    found = {row["path"]: row for row in first.to_pylist()}
    assert (found[key("a.png")]["width"], found[key("a.png")]["status"]) == (3, "ok")
    assert found[key("b.png")]["reason"] == "not a picture"
    assert found[key("a.png")]["size"] == len(picture.read_bytes())
