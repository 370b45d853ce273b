"""Surveys, checks and clearing of a folder of packs."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest
import torch

from simpletuner.cache.packs import PACK, PART, PARTIAL
from simpletuner.cache.store import TensorStore
from simpletuner.cache.upkeep import Collected, collect, damaged, survey


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def fill(folder: Path, *packs: range) -> None:
    """A pack for each range of numbers; an entry holds its number."""
    for numbers in packs:
        store = TensorStore.open(folder)
        for number in numbers:
            store.put(key(number), {"x": torch.full((100,), float(number))})
        store.close()


def values(folder: Path) -> dict[int, float]:
    store = TensorStore.open(folder)
    found = {n: float(store.get(key(n))["x"][0]) for n in range(40) if key(n) in there(store)}
    store.close()
    return found


def there(store: TensorStore) -> set[bytes]:
    every = [key(number) for number in range(40)]
    return set(every) - set(store.missing(every))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill(tmp_path / "packs", range(10), range(10, 20), range(20, 30))
    return tmp_path / "packs"


def test_a_survey_counts_wanted_present_and_unused(folder: Path) -> None:
    found = survey(folder, {key(number) for number in range(25, 35)})
    assert (found.wanted, found.present, found.unused, found.packs) == (10, 5, 25, 3)
    assert found.unused_bytes == 25 * 400
    assert found.file_bytes == sum(path.stat().st_size for path in folder.glob(f"*{PACK}"))


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    found = survey(tmp_path / "none", {key(1)})
    assert (found.wanted, found.present, found.packs) == (1, 0, 0)
    assert collect(tmp_path / "none", set()) == Collected(0, 0, 0)


def test_a_file_that_only_looks_like_a_mark_of_damage_is_passed_over(folder: Path) -> None:
    pack = next(folder.glob(f"*{PACK}")).stem
    for name in ("note.damaged", "x.note.damaged", f"{pack}.note.damaged", ".damaged"):
        (folder / name).write_text("mine")
    with closing(TensorStore.open(folder)) as store:
        assert len(store.missing([key(number) for number in range(3)])) == 0
    assert collect(folder, set(), dry=True).entries > 0


def test_unused_packs_go_and_half_used_ones_are_written_anew(folder: Path) -> None:
    wanted = set(range(10, 13)) | set(range(20, 28))
    before = sorted(path.name for path in folder.glob(f"*{PACK}"))

    would = collect(folder, {key(number) for number in wanted}, dry=True)
    assert would == Collected(17, 0, 17 * 400)
    assert sorted(path.name for path in folder.glob(f"*{PACK}")) == before

    done = collect(folder, {key(number) for number in wanted})

    after = sorted(path.name for path in folder.glob(f"*{PACK}"))
    assert done.entries == 10 + 7
    assert done.file_bytes > 0
    assert len(after) == 2
    assert set(after) & set(before) == {before[2]}  # 8 of 10 are used: it stays as it is
    assert values(folder) == {number: float(number) for number in (*wanted, 28, 29)}
    assert len(list(folder.glob(f"*{PART}"))) == 2
    again = collect(folder, {key(number) for number in wanted})
    assert again == Collected(0, 0, 0)


def test_what_is_there_twice_is_kept_once(tmp_path: Path) -> None:
    fill(tmp_path, range(10))
    other = tmp_path / "other"
    fill(other, range(10))
    for file in other.iterdir():
        os.rename(file, tmp_path / file.name)
    other.rmdir()
    every = {key(number) for number in range(10)}
    assert survey(tmp_path, every).unused == 10

    assert collect(tmp_path, every).entries == 10

    assert values(tmp_path) == {number: float(number) for number in range(10)}
    assert survey(tmp_path, every).unused == 0


def test_a_flipped_byte_is_found_and_only_this_entry_is_missing(folder: Path) -> None:
    pack = sorted(folder.glob(f"*{PACK}"))[1]
    data = bytearray(pack.read_bytes())
    place = data.index(torch.full((100,), 13.0).numpy().tobytes())
    data[place + 50] ^= 1
    pack.write_bytes(data)

    assert damaged(folder) == [key(13)]

    assert set(range(30)) - set(values(folder)) == {13}
    assert damaged(folder) == []
    every = {key(number) for number in range(30)}
    assert survey(folder, every).present == 29


def test_the_good_copy_of_a_damaged_entry_is_the_one_that_is_kept(folder: Path) -> None:
    pack = sorted(folder.glob(f"*{PACK}"))[1]
    data = bytearray(pack.read_bytes())
    data[-3] ^= 1
    pack.write_bytes(data)
    assert damaged(folder) == [key(19)]
    fill(folder, range(19, 20))
    every = {key(number) for number in range(30)}
    assert survey(folder, every).present == 30

    collect(folder, every)
    collect(folder, {key(19)})

    assert values(folder)[19] == 19.0


def test_only_old_unfinished_packs_are_removed(folder: Path) -> None:
    every = {key(number) for number in range(30)}
    for name, age in (("old", 7200), ("new", 10)):
        file = folder / f"{name}{PARTIAL}"
        file.write_bytes(b"x" * 100)
        then = file.stat().st_mtime - age
        os.utime(file, (then, then))
    assert survey(folder, every).unfinished == 2

    assert collect(folder, every) == Collected(0, 1, 100)

    assert (folder / f"new{PARTIAL}").exists()


def test_packs_that_cannot_be_read_and_parts_without_a_pack_are_removed(folder: Path) -> None:
    every = {key(number) for number in range(30)}
    broken = sorted(folder.glob(f"*{PACK}"))[0]
    broken.with_suffix(PART).unlink()
    broken.write_bytes(b"no pack" * 100)
    lone = folder / f"lone{PART}"
    lone.write_bytes(b"x" * 50)
    os.utime(lone, (1, 1))

    assert collect(folder, every, dry=True) == Collected(0, 2, 750)
    assert collect(folder, every) == Collected(0, 2, 750)

    assert not broken.exists()
    assert not lone.exists()
    assert values(folder) == {number: float(number) for number in range(10, 30)}
