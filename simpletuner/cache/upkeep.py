"""Looking after a folder of packs: what is in it, whether it is whole, and removing what is unused.

Nothing here runs by itself: a run never removes an entry.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from simpletuner.cache.packs import DAMAGED, PACK, PART, PARTIAL, damage_mark
from simpletuner.cache.parts import DamagedPackError, as_table, read_part, rebuild_entries
from simpletuner.cache.store import DamagedEntryError, TensorStore

STALE_SECONDS = 3600.0
"""A pack in the making is written to at least every two minutes; one this old is left by a kill."""

_WASTE = 0.5
"""The unused share of a pack from which on it is written anew without."""


@dataclass(frozen=True)
class Survey:
    """What a folder holds, beside what is wanted of it.

    Args:
        wanted: Entries that the settings ask for.
        present: Those of them that are there.
        unused: Entries that they do not ask for; other settings may.
        unused_bytes: Their size.
        file_bytes: Of all packs.
        packs: How many there are.
        unfinished: Packs in the making, or left by a kill.
        refused: Packs that cannot be read.
    """

    wanted: int
    present: int
    unused: int
    unused_bytes: int
    file_bytes: int
    packs: int
    unfinished: int
    refused: int


@dataclass(frozen=True)
class Collected:
    """What `collect` removed: entries, unfinished or unreadable packs, and bytes of files."""

    entries: int
    unfinished: int
    file_bytes: int


@dataclass(frozen=True)
class _Pack:
    path: Path
    table: pa.Table
    marked: frozenset[bytes]  # as damaged: they count as missing

    @property
    def keys(self) -> list[bytes]:
        found: list[bytes] = self.table["key"].to_pylist()
        return found

    @property
    def sizes(self) -> list[int]:
        found: list[int] = self.table["nbytes"].to_pylist()
        return found


def survey(folder: Path, wanted: Collection[bytes]) -> Survey:
    """Count what is in `folder`; nothing is changed."""
    packs, refused = _packs(folder)
    there: set[bytes] = set()
    unused = unused_bytes = 0
    for pack in packs:
        for key, size in zip(pack.keys, pack.sizes, strict=True):
            if key in wanted and key not in there and key not in pack.marked:
                there.add(key)
            else:  # nobody asks for it, it is damaged, or an earlier pack answers
                unused += 1
                unused_bytes += size
    return Survey(
        wanted=len(wanted),
        present=len(there),
        unused=unused,
        unused_bytes=unused_bytes,
        file_bytes=sum(pack.path.stat().st_size for pack in packs),
        packs=len(packs),
        unfinished=len(list(folder.glob(f"*{PARTIAL}"))),
        refused=len(refused),
    )


def damaged(folder: Path) -> list[bytes]:
    """Read every entry; those that are not as they were written are marked, and named here.

    A marked entry counts as missing: the next start encodes it again.
    """
    store = TensorStore.open(folder)
    found = []
    for pack in _packs(folder)[0]:
        for key in pack.keys:
            (row,) = store.locate([key])
            if row < 0:
                continue
            try:
                store.read_into(int(row), {})
            except DamagedEntryError:
                found.append(key)
    store.close()
    return found


def collect(folder: Path, wanted: Collection[bytes], *, dry: bool = False) -> Collected:
    """Remove the entries that are not in `wanted`, and what kills have left.

    A pack goes as a whole, or is written anew where at least half of it is unused; the new pack is
    sealed before the old one goes. No run may use the folder meanwhile.

    Args:
        folder: With the packs.
        wanted: The keys to keep.
        dry: Remove nothing; what is returned is what would go, its bytes those of the entries.

    Raises:
        CacheError: The disk refused.
    """
    before = _bytes(folder)
    entries = unused = 0
    there: set[bytes] = set()
    gone: list[_Pack] = []
    store = TensorStore.open(folder)
    packs, refused = _packs(folder)
    for pack in packs:
        sizes = dict(zip(pack.keys, pack.sizes, strict=True))
        kept = [
            key for key in sizes if key in wanted and key not in there and key not in pack.marked
        ]
        there.update(kept)
        used, all_ = sum(sizes[key] for key in kept), sum(sizes.values())
        if used > _WASTE * all_:
            continue
        gone.append(pack)
        entries += len(sizes) - len(kept)
        unused += all_ - used
        for key in () if dry else kept:
            try:
                store.put(key, store.get(key))
            except DamagedEntryError:  # it counts as missing, but for a copy in a later pack
                there.discard(key)
    store.close()
    lone = (p for p in folder.glob(f"*{PART}") if not p.with_suffix(PACK).exists())
    half = [file for file in (*folder.glob(f"*{PARTIAL}"), *lone) if _age(file) > STALE_SECONDS]
    left = half + [file for pack in refused for file in _files_of(pack)]
    count = len(half) + len(refused)
    if dry:
        return Collected(entries, count, unused + sum(file.stat().st_size for file in left))
    for file in [file for pack in gone for file in _files_of(pack.path)] + left:
        file.unlink(missing_ok=True)
    return Collected(entries, count, before - _bytes(folder))


def _files_of(pack: Path) -> list[Path]:
    """A pack's part, itself, and what marks entries of it as damaged; the part goes first."""
    stem, folder = pack.stem, pack.parent
    files = (folder / f"{stem}{PART}", pack, *folder.glob(f"{stem}.*{DAMAGED}"))
    return [file for file in files if file.exists()]


def _packs(folder: Path) -> tuple[list[_Pack], list[Path]]:
    """The packs in the order they were begun, and those that cannot be read."""
    found, refused = [], []
    for path in sorted(folder.glob(f"*{PACK}")):
        try:
            marks = path.parent.glob(f"{path.stem}.*{DAMAGED}")
            keys = frozenset(mark[1] for file in marks if (mark := damage_mark(file.name)))
            found.append(_Pack(path, _table(path), keys))
        except DamagedPackError:
            refused.append(path)
    return found, refused


def _table(pack: Path) -> pa.Table:
    part = pack.with_suffix(PART)
    if part.exists():
        return read_part(part, pack.stat().st_size)
    return as_table(rebuild_entries(pack))


def _age(file: Path) -> float:
    return time.time() - file.stat().st_mtime


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0
