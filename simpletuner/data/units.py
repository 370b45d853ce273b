"""One dataset cut into units, and the orders its pictures and units are drawn in."""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from simpletuner.core.seeds import Seeds
from simpletuner.data.buckets import group
from simpletuner.data.phases import Span

U64 = NDArray[np.uint64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]

EPOCHS_KEPT = 2
"""One that is drawn from, and the next one, which is read ahead."""


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


def mix(values: U64, salt: int) -> U64:
    """The finaliser of splitmix64 over `values` ^ `salt`; numpy does not promise its streams."""
    x = values ^ np.uint64(salt)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fractions(values: U64, salt: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) that depend on `values` and `salt`."""
    return (mix(values, salt) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Units:
    """A dataset's draws of an epoch, bucket by bucket and pass by pass, cut into units.

    A bucket's last unit may be short. What is held of each picture is its key and its row, sorted
    by bucket; all else is a few numbers a bucket, or an epoch's own.

    Args:
        source: The dataset.
        index: Its place in the user's list.
        size: Samples of a unit.
        seeds: What every order is drawn from.
    """

    def __init__(self, source: Drawable, index: int, size: int, seeds: Seeds) -> None:
        self.id, self.index, self.probability = source.id, index, source.probability
        self._size, self._seeds = size, seeds
        self._passes = source.repeats + 1
        sizes, bucket = group(source.buckets)
        # By bucket, then by key. Rows come in path order: it decides between equal contents, and
        # nothing else. Numbers that fit 16 bits are sorted without comparing.
        order = np.argsort(source.keys, kind="stable")
        small = bucket.astype(np.min_scalar_type(len(sizes)))
        order = order[np.argsort(small[order], kind="stable")]
        self._rows: I32 = order.astype(np.int32)
        self._keys: U64 = source.keys[order]
        counts = np.bincount(bucket, minlength=len(sizes))
        units = -(-counts * self._passes // size)
        self._sizes, self._units = sizes, units
        self._counts: list[int] = counts.tolist()
        self._first: list[int] = (np.cumsum(counts) - counts).tolist()
        self._before: list[int] = (np.cumsum(units) - units).tolist()
        self.count = int(units.sum())
        self.samples = len(order) * self._passes
        self.rows = lru_cache(EPOCHS_KEPT)(self._draw)
        self.order = lru_cache(EPOCHS_KEPT)(self._shuffle)

    def cut(self, unit: int) -> tuple[int, int]:
        """Where among the epoch's draws a unit begins, and how many it has."""
        bucket = bisect_right(self._before, unit) - 1
        done = (unit - self._before[bucket]) * self._size
        left = self._counts[bucket] * self._passes - done
        return self._first[bucket] * self._passes + done, min(self._size, left)

    def passes(self, unit: int, low: int, high: int) -> tuple[int, ...]:
        """Which pass each draw from `low` to `high`, all of one unit, belongs to."""
        bucket = bisect_right(self._before, unit) - 1
        first, count = self._first[bucket] * self._passes, self._counts[bucket]
        return tuple((draw - first) // count for draw in range(low, high))

    def times(self, epoch: int, rate: float) -> NDArray[np.float64]:
        """[units] when each comes up on a clock on which `rate` of them pass a tick."""
        shuffled = self._shuffle(epoch)
        times = np.empty(self.count)
        times[shuffled] = np.arange(self.count)
        jitter = fractions(self._unit_keys(), self._seeds.key("plan jitter", epoch, self.id))
        return (times + jitter) / rate

    def _draw(self, epoch: int) -> I32:
        """[samples] the rows in the order an epoch draws them."""
        drawn = np.empty(self.samples, np.int32)
        for occurrence in range(self._passes):
            salt = self._seeds.key("plan order", epoch, self.id, occurrence)
            keys = mix(self._keys, salt)
            for first, count in zip(self._first, self._counts, strict=True):
                own = slice(first, first + count)
                at = first * self._passes + occurrence * count
                drawn[at : at + count] = self._rows[own][np.argsort(keys[own], kind="stable")]
        return drawn

    def _shuffle(self, epoch: int) -> I32:
        """[units] their numbers in the order an epoch takes them."""
        keys = mix(self._unit_keys(), self._seeds.key("plan units", epoch, self.id))
        return np.argsort(keys, kind="stable").astype(np.int32)

    def _unit_keys(self) -> U64:
        """[units] what each is shuffled by: its size and its number within the bucket."""
        width, height = (self._sizes[:, axis].astype(np.uint64) for axis in (0, 1))
        size = np.repeat(mix(width << np.uint64(32) | height, 0), self._units)
        number = np.arange(self.count) - np.repeat(self._before, self._units)
        keys: U64 = size ^ number.astype(np.uint64)
        return keys
