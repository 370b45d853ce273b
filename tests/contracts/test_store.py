"""What users of a TensorStore may count on, seen from outside: files, processes, stock readers.

The packs are opened with stock safetensors and the parts with stock pyarrow, never with our reader.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError, safe_open

from simpletuner.cache.packs import Limits
from simpletuner.cache.store import TensorStore
from simpletuner.core.errors import CacheError
from simpletuner.core.events import Bus, Event, Notice


class Heard:
    """A sink that keeps what it hears."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def handle(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.texts.append(event.text)

    def close(self) -> None:
        pass


def key(i: int) -> bytes:
    return blake2b(str(i).encode(), digest_size=16).digest()


def entry(i: int) -> dict[str, torch.Tensor]:
    """Tensors that follow from `i`, of several dtypes, odd sizes, one empty, one scalar."""
    generator = torch.Generator().manual_seed(i)
    return {
        "latents": torch.randn(4, 3 + i % 3, 5, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "mask": torch.randn(3, generator=generator) > 0,
        "nothing": torch.zeros(0, 2),
        "count": torch.tensor(i),
    }


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in expected.items()
    )


def filled(folder: Path, numbers: range, **options: object) -> TensorStore:
    store = TensorStore.open(folder, **options)
    for i in numbers:
        store.put(key(i), entry(i))
    store.close()
    return store


def names(folder: Path, suffix: str) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix == suffix)


def test_what_was_put_is_read_back_by_the_same_store_at_once_and_by_a_new_one(tmp_path):
    store = TensorStore.open(tmp_path / "latents", write_batch_size=8)
    for i in range(20):
        store.put(key(i), entry(i))
        assert same(store.get(key(i)), entry(i))
    rows = store.locate([key(i) for i in range(20)])
    store.close()
    assert list(store.locate([key(i) for i in range(20)])) == list(rows), "rows never move"
    again = TensorStore.open(tmp_path / "latents")
    assert len(again) == 20
    assert all(same(again.get(key(i)), entry(i)) for i in range(20))


def test_a_pack_is_a_plain_safetensors_file_with_every_tensor_at_a_multiple_of_64(tmp_path):
    filled(tmp_path, range(30), write_batch_size=7)
    (name,) = names(tmp_path, ".safetensors")
    with safe_open(tmp_path / name, "pt") as pack:
        assert pack.metadata() == {"format": "pt", "cache": "1"}
        kept = {n for n in pack.keys() if not n.startswith("~")}
        assert kept == {f"{key(i).hex()}.{tensor}" for i in range(30) for tensor in entry(i)}
        for i in range(30):
            found = {t: pack.get_tensor(f"{key(i).hex()}.{t}") for t in entry(i)}
            assert same(found, entry(i))
    part = pq.read_table(tmp_path / name.replace(".safetensors", ".parquet"))
    assert part.column_names == ["key", "offset", "nbytes", "layout", "crc"]
    assert sorted(part["key"].to_pylist()) == sorted(key(i) for i in range(30))
    assert all(offset % 64 == 0 for offset in part["offset"].to_pylist())


def test_a_name_says_when_and_by_which_rank_a_pack_was_written(tmp_path):
    before = int(time.time() * 1000)
    filled(tmp_path, range(1), rank=5)
    (name,) = names(tmp_path, ".safetensors")
    stamp, rank, token = name.removesuffix(".safetensors").split("-")
    assert before <= int(stamp, 16) <= int(time.time() * 1000)
    assert (len(stamp), rank, len(token)) == (13, "005", 8)


def test_missing_keys_are_sorted_and_each_named_once(tmp_path):
    store = filled(tmp_path, range(5))
    asked = [key(9), key(3), key(7), key(9), key(0)]
    assert store.missing(asked) == sorted([key(7), key(9)])
    assert store.locate(asked)[[0, 2, 3]].tolist() == [-1, -1, -1]


def test_a_batch_is_read_straight_into_its_slices(tmp_path):
    store = TensorStore.open(tmp_path)
    parts = [torch.randn(4, 8, 8) for _ in range(3)]
    for i, tensor in enumerate(parts):
        store.put(key(i), {"other": torch.ones(5), "latents": tensor})
    store.seal()
    batch = torch.full((3, 4, 8, 8), torch.nan)
    for i, row in enumerate(store.locate([key(2), key(0), key(1)])):
        store.read_into(row, {"latents": batch[i]})
    assert torch.equal(batch, torch.stack([parts[2], parts[0], parts[1]]))
    with pytest.raises(ValueError, match=r"latents is torch.float32 \[4, 8, 8\] in the cache"):
        store.read_into(0, {"latents": torch.empty(4, 8, 9)})


def test_packs_are_sealed_by_size_by_tensor_count_and_by_age(tmp_path):
    def packs(folder: str, **limits: float) -> int:
        filled(tmp_path / folder, range(40), limits=Limits(**limits))
        return len(names(tmp_path / folder, ".safetensors"))

    assert packs("whole") == 1
    assert packs("bytes", pack_bytes=6000) > 3
    assert packs("tensors", tensors=60) > 3
    assert packs("age", seconds=0) == 40


def test_the_header_is_never_longer_than_its_reserve(tmp_path):
    store = TensorStore.open(tmp_path, limits=Limits(tensors=10**6))
    small = torch.ones(1)
    for i in range(6000):
        store.put(key(i), {"a" * 100: small})
    store.close()
    packs = names(tmp_path, ".safetensors")
    assert len(packs) > 1
    found = 0
    for name in packs:
        with safe_open(tmp_path / name, "pt") as pack:
            found += sum(not n.startswith("~") for n in pack.keys())
    assert found == 6000


def test_readers_see_packs_that_others_sealed_since(tmp_path):
    reader = TensorStore.open(tmp_path)
    assert reader.missing([key(1)]) == [key(1)]
    writer = TensorStore.open(tmp_path, rank=1)
    writer.put(key(1), entry(1))
    assert reader.missing([key(1)]) == [key(1)], "a pack that is not sealed belongs to its writer"
    writer.seal()
    assert reader.missing([key(1)]) == []
    assert same(reader.get(key(1)), entry(1))


def test_two_writers_of_the_same_keys_leave_one_answer(tmp_path):
    first, second = TensorStore.open(tmp_path), TensorStore.open(tmp_path, rank=1)
    for i in range(10):
        for store in (first, second):
            store.put(key(i), entry(i))
    first.close()
    second.close()
    again = TensorStore.open(tmp_path)
    assert len(names(tmp_path, ".safetensors")) == 2
    assert len(set(again.locate([key(i) for i in range(10)]).tolist())) == 10
    assert all(same(again.get(key(i)), entry(i)) for i in range(10))


def test_a_missing_or_broken_part_is_rebuilt_from_its_pack(tmp_path):
    filled(tmp_path, range(5))
    filled(tmp_path, range(5, 9))
    first, second = (tmp_path / name for name in names(tmp_path, ".parquet"))
    whole = pq.read_table(first)
    first.unlink()
    second.write_bytes(b"PAR1 nothing of the kind")
    heard = Heard()
    bus = Bus([heard])
    store = TensorStore.open(tmp_path, bus=bus)
    assert all(same(store.get(key(i)), entry(i)) for i in range(9))
    rebuilt = pq.read_table(first)
    for name in ("key", "offset", "nbytes", "crc"):
        assert rebuilt[name].to_pylist() == whole[name].to_pylist()
    bus.close()
    assert sum("was rebuilt from its pack" in text for text in heard.texts) == 2


@pytest.mark.parametrize("part", [True, False], ids=["with its part", "without its part"])
@pytest.mark.parametrize("left", [0, 5, 500_000, 2**20 + 100, -1])
def test_a_truncated_pack_is_refused_and_its_entries_are_missing(tmp_path, part, left):
    filled(tmp_path, range(5))
    filled(tmp_path, range(5, 9))
    path = tmp_path / names(tmp_path, ".safetensors")[0]
    data = path.read_bytes()
    path.write_bytes(data[:left])
    if not part:
        path.with_suffix(".parquet").unlink()
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass
    heard = Heard()
    bus = Bus([heard])
    store = TensorStore.open(tmp_path, bus=bus)
    assert store.missing([key(i) for i in range(9)]) == sorted(key(i) for i in range(5))
    assert same(store.get(key(7)), entry(7))
    assert list(store.refused) == [path.name]
    bus.close()
    assert any(path.name in text and "counts as missing" in text for text in heard.texts)


@pytest.mark.parametrize("at", [0, 7, 8, 40, 300])
def test_a_damaged_header_without_a_part_is_refused_not_a_crash(tmp_path, at):
    filled(tmp_path, range(5))
    (name,) = names(tmp_path, ".safetensors")
    (tmp_path / name).with_suffix(".parquet").unlink()
    with (tmp_path / name).open("rb+") as file:
        file.seek(at)
        file.write(b"\xff\x00]")
    store = TensorStore.open(tmp_path)
    assert list(store.refused) == [name]
    assert len(store.missing([key(i) for i in range(5)])) == 5


def test_unfinished_packs_and_parts_without_a_pack_are_not_used(tmp_path):
    filled(tmp_path, range(3))
    (tmp_path / "0123456789abc-000-01234567.partial").write_bytes(b"half")
    (name,) = names(tmp_path, ".parquet")
    orphan = tmp_path / "0123456789abd-000-01234567.parquet"
    orphan.write_bytes((tmp_path / name).read_bytes())
    store = TensorStore.open(tmp_path)
    assert store.partials == 1
    assert store.refused == {orphan.name: "its pack is gone"}
    assert len(store) == 3


def test_a_flipped_byte_is_an_error_that_names_pack_and_key(tmp_path):
    filled(tmp_path, range(3))
    (name,) = names(tmp_path, ".safetensors")
    offset = pq.read_table(tmp_path / name.replace("safetensors", "parquet"))["offset"][1].as_py()
    with (tmp_path / name).open("rb+") as file:
        file.seek(offset + 3)
        byte = file.read(1)
        file.seek(offset + 3)
        file.write(bytes([byte[0] ^ 4]))
    store = TensorStore.open(tmp_path)
    assert same(store.get(key(0)), entry(0))
    with pytest.raises(CacheError) as caught:
        store.get(key(1))
    assert f"{name} is damaged at entry {key(1).hex()}" in str(caught.value)
    assert "start again: it is encoded again, and the rest is kept" in str(caught.value)


def test_an_entry_found_damaged_is_missing_from_then_on_until_it_is_put_again(tmp_path):
    filled(tmp_path, range(3))
    (name,) = names(tmp_path, ".safetensors")
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 4  # of the last entry
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CacheError):
        TensorStore.open(tmp_path).get(key(2))
    for _ in range(2):  # the part is there, and then rebuilt from the pack as it is
        heard = Heard()
        bus = Bus([heard])
        store = TensorStore.open(tmp_path, bus=bus)
        bus.close()
        assert store.missing([key(i) for i in range(3)]) == [key(2)]
        assert any(f"damaged at {key(2).hex()}" in text for text in heard.texts)
        (tmp_path / name).with_suffix(".parquet").unlink()
    filled(tmp_path, range(2, 3))
    heard = Heard()
    bus = Bus([heard])
    store = TensorStore.open(tmp_path, bus=bus)
    bus.close()
    assert all(same(store.get(key(i)), entry(i)) for i in range(3))
    assert not any("damaged" in text for text in heard.texts)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow past the header and 5,000 bytes; the system answers as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20 + 5000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_names_the_folder_and_the_fix_and_keeps_what_was_sealed(tmp_path):
    filled(tmp_path, range(3))
    store = TensorStore.open(tmp_path, write_batch_size=50)
    for i in range(3, 52):
        store.put(key(i), entry(i))
    with pytest.raises(CacheError) as caught:
        store.put(key(52), entry(52))
    assert f"the cache in {tmp_path} cannot be written" in str(caught.value)
    assert "GB are free there: make room, or set the cache's folder to another disk" in str(
        caught.value
    )
    store.close()
    again = TensorStore.open(tmp_path)
    assert len(again) == 3
    assert again.partials == 1


WRITERS = """
import os
import sys
from pathlib import Path
from simpletuner.cache.packs import Limits
from simpletuner.cache.store import TensorStore
from tests.contracts.test_store import entry, key

def write(start, stop):
    store = TensorStore.open(Path(sys.argv[1]), write_batch_size=4, limits=Limits(pack_bytes=8000))
    for i in range(start, stop):
        store.put(key(i), entry(i))
    store.close()

children = []
for bounds in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        write(*map(int, bounds.split("-")))
        os._exit(0)
    children.append(child)
print(*children, flush=True)
sys.exit(sum(os.waitpid(child, 0)[1] for child in children) != 0)
"""


def writers(folder: Path, *bounds: str) -> subprocess.Popen[bytes]:
    """One process whose children each put the entries of one range; it prints their ids."""
    command = [sys.executable, "-c", WRITERS, str(folder), *bounds]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_only_what_was_not_sealed(tmp_path):
    moments = random.Random(0)
    ranges = [range(n * 10_000, n * 10_000 + 5_000) for n in range(5)]
    run = writers(tmp_path, *(f"{r.start}-{r.stop}" for r in ranges))
    assert run.stdout is not None
    for child in run.stdout.readline().split():
        time.sleep(moments.uniform(0.05, 0.3))
        os.kill(int(child), signal.SIGKILL)
    run.communicate()
    sealed = names(tmp_path, ".safetensors")
    assert sealed
    store = TensorStore.open(tmp_path)
    assert store.refused == {}
    assert store.partials <= len(ranges)
    readable = 0
    for numbers in ranges:
        there = (store.locate([key(i) for i in numbers]) >= 0).tolist()
        count = sum(there)
        assert there == [True] * count + [False] * (len(there) - count), "sealed in order"
        assert all(same(store.get(key(i)), entry(i)) for i in numbers[:count])
        readable += count
    assert 0 < readable == len(store) < 5 * 5_000
    for name in sealed:
        with safe_open(tmp_path / name, "pt"):
            pass


@pytest.mark.slow
def test_two_processes_fill_one_folder_at_once(tmp_path):
    run = writers(tmp_path, "0-150", "100-250")
    run.communicate()
    assert run.returncode == 0
    store = TensorStore.open(tmp_path)
    assert (store.refused, store.partials) == ({}, 0)
    assert store.missing([key(i) for i in range(250)]) == []
    assert all(same(store.get(key(i)), entry(i)) for i in range(250))
