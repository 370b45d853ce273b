"""What a store knows of its entries: rows that never move, found by bulk binary search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from simpletuner.cache.packs import KEY_BYTES, Entry, Layout, parse_layout

_HALVES = np.dtype([("hi", ">u8"), ("lo", ">u8")])
_ROW = np.dtype(
    [
        ("hi", np.uint64),
        ("lo", np.uint64),
        ("offset", np.int64),
        ("pack", np.int32),
        ("layout", np.int32),
        ("crc", np.uint32),
    ]
)


@dataclass(frozen=True)
class Row:
    """Where an entry lies: `offset` is absolute in pack number `pack`."""

    key: bytes
    offset: int
    layout: Layout
    crc: int
    pack: int


class Index:
    """Entries in the order they became known; the first of equal keys is the one that is found.

    Entries put by this process wait in a dict and join the sorted arrays when a pack is sealed: a
    million keys cost 60 MB and half a second to sort, so they are not sorted for each of them.
    """

    def __init__(self) -> None:
        self._rows: NDArray[np.void] = np.empty(0, _ROW)
        self._fresh: list[tuple[Entry, int]] = []
        self._recent: dict[bytes, int] = {}
        self._numbers: dict[str, int] = {}
        self._layouts: list[Layout] = []
        self._sort()

    def __len__(self) -> int:
        return len(self._rows) + len(self._fresh)

    def append(self, entry: Entry, pack: int) -> int:
        """Add one entry; returns its row."""
        row = len(self)
        self._fresh.append((entry, pack))
        self._recent.setdefault(entry.key, row)
        return row

    def waits(self, key: bytes) -> bool:
        """True if an entry of this key was appended and is not settled."""
        return key in self._recent

    def settle(self, parts: Sequence[tuple[pa.Table, int]] = ()) -> None:
        """Add `parts`, each with the number of its pack, and sort what was appended."""
        fresh = [self._of_entry(entry, pack) for entry, pack in self._fresh]
        chunks = [np.array(fresh, _ROW), *(self._of_part(table, pack) for table, pack in parts)]
        self._fresh, self._recent = [], {}
        if any(map(len, chunks)):
            self._rows = np.concatenate([self._rows, *chunks])
            self._sort()

    def _of_entry(self, entry: Entry, pack: int) -> tuple[int, ...]:
        hi, lo = int.from_bytes(entry.key[:8], "big"), int.from_bytes(entry.key[8:], "big")
        return hi, lo, entry.offset, pack, self._number(entry.layout), entry.crc

    def _of_part(self, table: pa.Table, pack: int) -> NDArray[np.void]:
        rows = np.empty(len(table), _ROW)
        if not len(rows):
            return rows
        rows["hi"], rows["lo"] = _halves(b"".join(table["key"].to_pylist()))
        rows["pack"] = pack
        for name in ("offset", "crc"):
            rows[name] = table[name].to_numpy()
        layouts = table["layout"].combine_chunks()
        numbers = [self._number(text) for text in layouts.dictionary.to_pylist()]
        rows["layout"] = np.array(numbers, np.int32)[layouts.indices.to_numpy()]
        return rows

    def locate(self, keys: Sequence[bytes]) -> NDArray[np.int32]:
        """The row of each key, −1 where it is not known."""
        if any(len(key) != KEY_BYTES for key in keys):
            raise ValueError(f"a key has {KEY_BYTES} bytes")
        hi, lo = _halves(b"".join(keys))
        place = np.searchsorted(self._hi, hi)
        last = len(self._hi) - 1
        found = np.full(len(keys), -1, np.int32)
        if last >= 0:
            # Different keys may share their high half: walk on while they do.
            open_ = (place <= last) & (self._hi[np.minimum(place, last)] == hi)
            while open_.any():
                hit = open_ & (self._lo[np.minimum(place, last)] == lo)
                found[hit] = self._order[place[hit]]
                place = place + 1
                open_ &= ~hit & (place <= last) & (self._hi[np.minimum(place, last)] == hi)
        if self._recent:
            for i in np.flatnonzero(found < 0).tolist():
                found[i] = self._recent.get(keys[i], -1)
        return found

    def row(self, number: int) -> Row:
        """What is known of row `number`."""
        if number >= len(self._rows):
            entry, pack = self._fresh[number - len(self._rows)]
            layout = self._layouts[self._number(entry.layout)]
            return Row(entry.key, entry.offset, layout, entry.crc, pack)
        row = self._rows[number]
        key = int(row["hi"]).to_bytes(8, "big") + int(row["lo"]).to_bytes(8, "big")
        layout = self._layouts[row["layout"]]
        return Row(key, int(row["offset"]), layout, int(row["crc"]), int(row["pack"]))

    def _number(self, text: str) -> int:
        if text not in self._numbers:
            self._layouts.append(parse_layout(text))
            self._numbers[text] = len(self._layouts) - 1
        return self._numbers[text]

    def _sort(self) -> None:
        hi, lo = self._rows["hi"], self._rows["lo"]
        order = np.lexsort((np.arange(len(hi)), lo, hi)).astype(np.int32)
        hi, lo = hi[order], lo[order]
        first = np.ones(len(hi), bool)
        first[1:] = (hi[1:] != hi[:-1]) | (lo[1:] != lo[:-1])
        self._hi, self._lo, self._order = hi[first], lo[first], order[first]


def _halves(keys: bytes) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    halves = np.frombuffer(keys, _HALVES)
    return halves["hi"].astype(np.uint64), halves["lo"].astype(np.uint64)
