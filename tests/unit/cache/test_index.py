"""Bulk lookup against a plain dict."""

from __future__ import annotations

import numpy as np

from simpletuner.cache.index import Index
from simpletuner.cache.packs import Entry
from simpletuner.cache.parts import as_table


def entries(keys: list[bytes]) -> list[Entry]:
    return [Entry(key, i * 64, 4, '[["x","F32",[1],0]]', i) for i, key in enumerate(keys)]


def keys(count: int, seed: int = 0) -> list[bytes]:
    """Keys of which many share their first half, and some are equal."""
    numbers = np.random.default_rng(seed).integers(0, count // 4, (count, 2))
    return [int(a).to_bytes(8, "big") + int(b).to_bytes(8, "big") for a, b in numbers % 40]


def test_every_key_is_found_at_its_first_row_whether_sorted_or_fresh():
    old, new = keys(800, 1), keys(400, 2)
    index = Index()
    index.settle([(as_table(entries(old)), 0)])
    for each in entries(new):
        index.append(each, 1)
    expected: dict[bytes, int] = {}
    for row, key in enumerate(old + new):
        expected.setdefault(key, row)
    asked = keys(2000, 3)
    right = [expected.get(key, -1) for key in asked]
    assert -1 in right
    assert index.locate(asked).tolist() == right
    index.settle()
    assert index.locate(asked).tolist() == right, "rows never move"
    assert len(index) == 1200


def test_a_row_says_where_its_entry_lies_before_and_after_sorting():
    index = Index()
    index.settle([(as_table(entries(keys(10))), 4)])
    row = index.append(Entry(b"k" * 16, 640, 8, '[["y","BF16",[2,2],0]]', 99), 7)
    for _ in range(2):
        found = index.row(row)
        assert (found.key, found.offset, found.crc, found.pack) == (b"k" * 16, 640, 99, 7)
        assert [(slot.name, slot.shape) for slot in found.layout] == [("y", (2, 2))]
        assert index.row(3).pack == 4
        assert index.row(3).offset == 3 * 64
        index.settle()


def test_an_empty_index_has_no_key():
    assert Index().locate([b"k" * 16]).tolist() == [-1]
    assert Index().locate([]).tolist() == []
