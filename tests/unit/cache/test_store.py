"""How the store deals with the system: few writes, short reads and writes, few open files."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.cache import store as store_module
from simpletuner.cache.packs import Limits
from simpletuner.cache.store import TensorStore


def key(i: int) -> bytes:
    return i.to_bytes(16, "big")


def fill(folder: Path, count: int, **options: object) -> None:
    store = TensorStore.open(folder, **options)
    for i in range(count):
        store.put(key(i), {"x": torch.full((3, 100), float(i)), "y": torch.full((7,), i)})
    store.close()


def check(folder: Path, count: int) -> None:
    store = TensorStore.open(folder)
    for i in range(count):
        found = store.get(key(i))
        assert torch.equal(found["x"], torch.full((3, 100), float(i)))
        assert torch.equal(found["y"], torch.full((7,), i))


def test_write_batch_size_entries_are_gathered_before_one_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = os.pwritev, []

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        written.append(offset)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pwritev", counted)
    fill(tmp_path, 20, write_batch_size=5)
    assert len(written) == 4 + 1
    assert written[0] == 2**20, "entries come after the space kept for the header"
    assert written[-1] == 0, "the header is written last"
    check(tmp_path, 20)


def test_writes_and_reads_that_the_system_cuts_short_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: write(fd, [views[0][:999]], at))
    fill(tmp_path, 8)
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read(fd, [views[0][:77]], at))
    check(tmp_path, 8)


def test_a_pack_is_named_only_after_its_bytes_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = os.fsync, []

    def watched(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        kind = target.parent.suffix or target.suffix  # a part is written in a folder of its own
        seen.append(kind if target.is_file() else "folder")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    fill(tmp_path, 2)
    assert seen == [".partial", "folder", ".tmp", "folder"]


def test_few_packs_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_OPEN_PACKS", 3)
    fill(tmp_path, 8, limits=Limits(seconds=0))
    store = TensorStore.open(tmp_path)
    for i in [*range(8), 0, 7, 3]:
        assert store.get(key(i))["y"][0] == i
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        targets = [os.readlink(link) for link in links if os.path.lexists(link)]
        assert sum(target.startswith(str(tmp_path)) for target in targets) <= 3


def test_several_threads_share_a_store(tmp_path: Path) -> None:
    store = TensorStore.open(tmp_path, write_batch_size=4, limits=Limits(pack_bytes=20_000))

    def work(i: int) -> bool:
        store.put(key(i), {"x": torch.full((50,), i)})
        store.put(key(i // 2), {"x": torch.full((50,), i // 2)})
        return bool(store.get(key(i))["x"][0] == i and store.get(key(i // 2)) is not None)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))
    store.close()
    assert TensorStore.open(tmp_path).missing([key(i) for i in range(200)]) == []


def test_a_cache_that_may_only_be_read_is_read(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    before = sorted(os.listdir(tmp_path))
    check(tmp_path, 3)
    assert TensorStore.open(tmp_path / "not there").missing([key(1)]) == [key(1)]
    assert sorted(os.listdir(tmp_path)) == before, "reading makes nothing"


def test_a_pack_has_each_entry_once(tmp_path: Path) -> None:
    store = TensorStore.open(tmp_path)
    for value in (1.0, 2.0):
        store.put(b"k" * 16, {"x": torch.full((4,), value)})
    store.close()

    (pack,) = tmp_path.glob("*.safetensors")
    assert [float(t[0]) for name, t in load_file(pack).items() if "x" in name] == [1.0]
