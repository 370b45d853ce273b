"""One dataset cut into units, and the orders its pictures and units are drawn in."""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from simpletuner.core.seeds import Seeds
from simpletuner.data.buckets import group
from simpletuner.data.permutation import I64, fractions, mix, permuted
from simpletuner.data.phases import Span

I32 = NDArray[np.int32]

EPOCHS_KEPT = 2
"""One that is drawn from, and the next one, which is read ahead."""

SORTED = 1 << 16
"""Up to so many pictures of one size, or units, an order is sorted by a hash of each; beyond, it is
a permutation that is computed where it is asked for."""

ORDERS_KEPT = 256
"""Sorted orders that are held: 64 MB at most."""


class Drawable(Protocol):
    """What the plan asks of a dataset of n pictures."""

    @property
    def id(self) -> str:
        """The dataset's name."""

    @property
    def keys(self) -> NDArray[np.uint64]:
        """[n] u64: the first 8 bytes of each content digest."""

    @property
    def buckets(self) -> NDArray[np.int32]:
        """[n, 2] width and height that is encoded."""

    @property
    def repeats(self) -> int:
        """Further passes within an epoch."""

    @property
    def probability(self) -> float:
        """How often it is drawn from, beside the other datasets."""

    @property
    def train_batch_size(self) -> int | None:
        """Samples of one micro-batch on one rank; None for the run's."""

    @property
    def span(self) -> Span:
        """The part of the run in which it is drawn from."""


class Units:
    """A dataset's draws of an epoch, bucket by bucket and pass by pass, cut into units.

    A bucket's last unit may be short. What is held of each picture is its row, by bucket and then
    by its key.

    Args:
        source: The dataset.
        index: Its place in the user's list.
        size: Samples of a unit.
        seeds: What every order is drawn from.
    """

    def __init__(self, source: Drawable, index: int, size: int, seeds: Seeds) -> None:
        self.id, self.index, self.probability = source.id, index, source.probability
        self._source = source
        self._size, self._seeds = size, seeds
        self._passes = source.repeats + 1
        sizes, bucket = group(source.buckets)
        # By bucket, then by key. Rows come in path order: it decides between equal contents, and
        # nothing else. Numbers that fit 16 bits are sorted without comparing.
        order = np.argsort(source.keys, kind="stable")
        small = bucket.astype(np.min_scalar_type(len(sizes)))
        order = order[np.argsort(small[order], kind="stable")]
        self._rows: I32 = order.astype(np.int32)
        counts = np.bincount(bucket, minlength=len(sizes))
        units = -(-counts * self._passes // size)
        self._sizes = sizes
        self._counts: list[int] = counts.tolist()
        self._first: list[int] = (np.cumsum(counts) - counts).tolist()
        self._before: list[int] = (np.cumsum(units) - units).tolist()
        self.count = int(units.sum())
        self.samples = len(order) * self._passes
        self._order = lru_cache(ORDERS_KEPT)(self._sort)
        self._unit_order = lru_cache(EPOCHS_KEPT)(self._sort_units)

    def size(self, unit: int) -> int:
        """How many draws a unit has."""
        bucket, begin = self._place(unit)
        return min(self._size, self._counts[bucket] * self._passes - begin)

    def draw(
        self, epoch: int, unit: int, low: int, high: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The draws `low` … `high` - 1 of a unit, counted from its first.

        Returns:
            The row of each, and which pass through its bucket it belongs to.
        """
        bucket, begin = self._place(unit)
        first, count = self._first[bucket], self._counts[bucket]
        passes, places = np.divmod(np.arange(begin + low, begin + high), count)
        rows = np.empty(len(places), np.int64)
        size = self._sizes[bucket].tolist()
        for occurrence in np.unique(passes).tolist():
            own = passes == occurrence
            if count <= SORTED:
                rows[own] = first + self._order(epoch, occurrence, bucket)[places[own]]
            else:
                key = self._seeds.key("plan order", epoch, self.id, occurrence, *size)
                rows[own] = first + permuted(places[own], count, key)
        return tuple(self._rows[rows].tolist()), tuple(passes.tolist())

    def unit_at(self, epoch: int, places: I64) -> I64:
        """The units that an epoch takes at some places of its order."""
        if self.count <= SORTED:
            return self._unit_order(epoch)[places].astype(np.int64)
        return permuted(places, self.count, self._seeds.key("plan units", epoch, self.id))

    def times(self, epoch: int, rate: float) -> NDArray[np.float64]:
        """[units] when each comes up on a clock on which `rate` of them pass a tick."""
        times = np.empty(self.count)
        times[self.unit_at(epoch, np.arange(self.count))] = np.arange(self.count)
        jitter = fractions(self._unit_keys(), self._seeds.key("plan jitter", epoch, self.id))
        return (times + jitter) / rate

    def _sort(self, epoch: int, occurrence: int, bucket: int) -> I32:
        """[count] the pictures of a bucket in the order of a hash of their contents.

        One more picture leaves the order of the others as it is.
        """
        own = slice(self._first[bucket], self._first[bucket] + self._counts[bucket])
        keys = self._source.keys[self._rows[own]]
        salt = self._seeds.key("plan order", epoch, self.id, occurrence)
        return np.argsort(mix(keys, salt), kind="stable").astype(np.int32)

    def _sort_units(self, epoch: int) -> I32:
        keys = mix(self._unit_keys(), self._seeds.key("plan units", epoch, self.id))
        return np.argsort(keys, kind="stable").astype(np.int32)

    def _unit_keys(self) -> NDArray[np.uint64]:
        """[units] what each is shuffled by: its size and its number within the bucket."""
        width, height = (self._sizes[:, axis].astype(np.uint64) for axis in (0, 1))
        counts = np.diff([*self._before, self.count])
        size = np.repeat(mix(width << np.uint64(32) | height, 0), counts)
        number = np.arange(self.count) - np.repeat(self._before, counts)
        keys: NDArray[np.uint64] = size ^ number.astype(np.uint64)
        return keys

    def _place(self, unit: int) -> tuple[int, int]:
        """A unit's bucket, and its first draw among those of the bucket's passes."""
        bucket = bisect_right(self._before, unit) - 1
        return bucket, (unit - self._before[bucket]) * self._size
