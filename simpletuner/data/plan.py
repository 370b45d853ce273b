"""Which pictures are trained on in which step: a pure function of the seed and the step number.

A *unit* is what all ranks together take in one micro-batch: `world` x `train_batch_size` draws of
one dataset and one exact size. A *window* is what one optimizer step takes: `accumulation` units.
An epoch is every unit once; its last window may have fewer units, and a bucket's last unit may be
short. Nothing is dropped, nothing is drawn twice to fill up.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from simpletuner.core.errors import DataError
from simpletuner.core.seeds import Seeds, key64
from simpletuner.core.types import PlannedBatch
from simpletuner.data.buckets import group

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

EPOCHS_KEPT = 2


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


def mix(values: U64, salt: int) -> U64:
    """The finaliser of splitmix64 over `values` ^ `salt`; numpy does not promise its streams."""
    x = values ^ np.uint64(salt)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class _Dataset:
    """One dataset cut into units; what does not change from epoch to epoch."""

    def __init__(self, source: Drawable, index: int, unit: int) -> None:
        sizes, bucket = group(source.buckets)
        # Rows come in path order: it decides between equal contents, and nothing else.
        self.rows: I64 = np.lexsort((source.keys, bucket))
        self.keys: U64 = source.keys[self.rows]
        self.bucket: I64 = bucket[self.rows]
        self.id = source.id
        self.index = index
        self.probability = source.probability
        self.passes = source.repeats + 1
        counts = np.bincount(bucket, minlength=len(sizes))
        first = np.concatenate(([0], np.cumsum(counts)))[:-1]
        self.shift: I64 = (first * (self.passes - 1))[self.bucket]  # a bucket's draws lie together
        self.count: I64 = counts[self.bucket]
        units = -(-counts * self.passes // unit)
        number = np.arange(units.sum()) - np.repeat(np.cumsum(units) - units, units)
        self.start: I64 = np.repeat(first * self.passes, units) + number * unit
        end = np.repeat((first + counts) * self.passes, units)
        self.size: I64 = np.minimum(unit, end - self.start)
        self.unit_key: U64 = self._unit_keys(np.repeat(sizes, units, axis=0), number)

    @staticmethod
    def _unit_keys(sizes: I64, number: I64) -> U64:
        """What a unit is shuffled by: its size and its number within the bucket."""
        width, height = (sizes[:, axis].astype(np.uint64) for axis in (0, 1))
        return mix(width << np.uint64(32) | height, 0) ^ number.astype(np.uint64)

    def draws(self, seeds: Seeds, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The rows in the order they are drawn, bucket by bucket, and the pass of each."""
        total = len(self.rows) * self.passes
        rows, passes = np.empty(total, np.int32), np.empty(total, np.int32)
        place = np.arange(len(self.rows)) + self.shift
        for occurrence in range(self.passes):
            salt = seeds.key("plan order", epoch, self.id, occurrence)
            order = np.lexsort((mix(self.keys, salt), self.bucket))
            at = place + occurrence * self.count
            rows[at] = self.rows[order]
            passes[at] = occurrence
        return rows, passes

    def times(self, seeds: Seeds, epoch: int, rate: float) -> NDArray[np.float64]:
        """When each unit comes up on a clock on which `rate` units of this dataset pass a tick."""
        shuffled = np.argsort(
            mix(self.unit_key, seeds.key("plan units", epoch, self.id)), kind="stable"
        )
        place = np.empty(len(shuffled), np.int64)
        place[shuffled] = np.arange(len(shuffled))
        jitter = mix(self.unit_key, seeds.key("plan jitter", epoch, self.id)) >> np.uint64(11)
        return (place + jitter * 2.0**-53) / rate


@dataclass(frozen=True)
class _Epoch:
    rows: tuple[NDArray[np.int32], ...]
    passes: tuple[NDArray[np.int32], ...]
    dataset: NDArray[np.int32]
    start: I64
    size: I64
    before: I64


class BatchPlan:
    """Random access to the windows of a run; build it with `of`."""

    def __init__(
        self,
        datasets: Sequence[_Dataset],
        rates: Sequence[float],
        *,
        accumulation: int,
        world: int,
        seeds: Seeds,
        fingerprint: Mapping[str, str],
    ) -> None:
        self.accumulation = accumulation
        self.world = world
        self.seeds = seeds
        self.fingerprint = dict(fingerprint)
        self._datasets = tuple(datasets)
        self._rates = tuple(rates)
        self.units_per_epoch = sum(len(dataset.size) for dataset in datasets)
        self.windows_per_epoch = -(-self.units_per_epoch // accumulation)
        self.samples_per_epoch = sum(len(d.rows) * d.passes for d in datasets)
        self._epochs: dict[int, _Epoch] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(
        cls,
        sources: Sequence[Drawable],
        *,
        train_batch_size: int,
        gradient_accumulation_steps: int,
        seeds: Seeds,
        world: int = 1,
    ) -> BatchPlan:
        """The plan for `sources`.

        Args:
            sources: The datasets; a PlannedBatch names one by its place here.
            train_batch_size: Samples of one micro-batch on one rank.
            gradient_accumulation_steps: Micro-batches of one optimizer step.
            seeds: What every order is drawn from.
            world: Number of ranks.

        Raises:
            DataError: There is nothing to draw.
        """
        unit = world * train_batch_size
        # In the order of their names, so that the order in the user's file changes nothing.
        named = sorted(enumerate(sources), key=lambda pair: pair[1].id)
        drawn = [(i, source) for i, source in named if source.probability > 0 and len(source.keys)]
        if not drawn:
            raise DataError(
                "no dataset has a picture to draw",
                fix="give at least one dataset a probability above 0",
            )
        datasets = [_Dataset(source, index, unit) for index, source in drawn]
        return cls(
            datasets,
            _rates([(d.probability, len(d.size)) for d in datasets]),
            accumulation=gradient_accumulation_steps,
            world=world,
            seeds=seeds,
            fingerprint=_fingerprint(
                [source for _, source in named], unit, gradient_accumulation_steps, seeds
            ),
        )

    def epoch(self, step: int) -> int:
        """The 0-based epoch that optimizer step `step` (0-based) lies in."""
        return step // self.windows_per_epoch

    def window(self, step: int, rank: int = 0) -> tuple[PlannedBatch, ...]:
        """The micro-batches of `rank` in optimizer step `step`; as many on every rank.

        A rank without a share of a unit gets the unit's first sample as a ghost of weight 0.
        """
        epoch, window = divmod(step, self.windows_per_epoch)
        plan = self._epoch(epoch)
        first = window * self.accumulation
        last = min(first + self.accumulation, self.units_per_epoch)
        total = int(plan.before[last] - plan.before[first])
        return tuple(
            self._share(plan, epoch, unit, first, total, rank) for unit in range(first, last)
        )

    def _share(
        self, plan: _Epoch, epoch: int, unit: int, first: int, total: int, rank: int
    ) -> PlannedBatch:
        size, dataset = int(plan.size[unit]), int(plan.dataset[unit])
        low, high = size * rank // self.world, size * (rank + 1) // self.world
        ghost = low == high
        if ghost:
            low, high = 0, 1
        start = int(plan.start[unit])
        offset = int(plan.before[unit] - plan.before[first])
        return PlannedBatch(
            source=self._datasets[dataset].index,
            rows=tuple(plan.rows[dataset][start + low : start + high].tolist()),
            occurrences=tuple(plan.passes[dataset][start + low : start + high].tolist()),
            weights=(0.0 if ghost else 1.0,) * (high - low),
            positions=tuple(range(offset + low, offset + high)),
            window_samples=total,
            epoch=epoch,
        )

    def _epoch(self, epoch: int) -> _Epoch:
        with self._lock:
            if epoch not in self._epochs:
                while len(self._epochs) >= EPOCHS_KEPT:
                    self._epochs.pop(next(iter(self._epochs)))
                self._epochs[epoch] = self._build(epoch)
            return self._epochs[epoch]

    def _build(self, epoch: int) -> _Epoch:
        rows, passes = zip(*(d.draws(self.seeds, epoch) for d in self._datasets), strict=True)
        times = [
            d.times(self.seeds, epoch, rate)
            for d, rate in zip(self._datasets, self._rates, strict=True)
        ]
        order = np.argsort(np.concatenate(times), kind="stable")
        lengths = [len(d.size) for d in self._datasets]
        size = np.concatenate([d.size for d in self._datasets])[order]
        return _Epoch(
            rows=rows,
            passes=passes,
            dataset=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[order],
            start=np.concatenate([d.start for d in self._datasets])[order],
            size=size,
            before=np.concatenate(([0], np.cumsum(size))),
        )


def _rates(datasets: Sequence[tuple[float, int]]) -> list[float]:
    """Units per tick of each dataset, from its (probability, units).

    As long as none says otherwise, each in proportion to its length, so that all last the whole
    epoch; else as the probabilities say, and the longest-lasting dataset is the end of the epoch.
    """
    if all(probability == 1.0 for probability, _ in datasets):
        return [float(units) for _, units in datasets]
    return [probability for probability, _ in datasets]


def _fingerprint(
    sources: Sequence[Drawable], unit: int, accumulation: int, seeds: Seeds
) -> dict[str, str]:
    """What the order depends on, by names a message can use; a batch is that of all ranks."""
    facts = {
        "seed": str(seeds.seed),
        "train_batch_size": str(unit),
        "gradient_accumulation_steps": str(accumulation),
    }
    for source in sources:
        name = f"dataset {source.id}"
        width, height = source.buckets[:, 0], source.buckets[:, 1]
        order = np.lexsort((height, width, source.keys))
        facts[f"{name}: pictures"] = _digest(source.keys[order], "<u8")
        facts[f"{name}: sizes"] = _digest(source.buckets[order], "<i4")
        facts[f"{name}: repeats"] = str(source.repeats)
        facts[f"{name}: probability"] = str(source.probability)
    return facts


def _digest(values: NDArray[np.generic], dtype: str) -> str:
    return f"{len(values)}, {key64(values.astype(dtype).tobytes()):016x}"
