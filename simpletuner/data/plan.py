"""Which pictures are trained on in which step: a pure function of the seed and the step number.

A *unit* is what all ranks together take in one micro-batch: `world` x `train_batch_size` draws of
one dataset and one exact size. A *window* is what one optimizer step takes: `accumulation` units.
An epoch is every unit once; its last window may have fewer units, and a bucket's last unit may be
short. Nothing is dropped, nothing is drawn twice to fill up. Under ``mix`` each dataset has such
epochs of its own; one of the run is then as many units as they have together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from simpletuner.core.errors import DataError
from simpletuner.core.seeds import Seeds, key64
from simpletuner.core.types import PlannedBatch
from simpletuner.data.mixing import Mixing, Turn
from simpletuner.data.phases import Phases
from simpletuner.data.sampling import SAMPLINGS
from simpletuner.data.units import Drawable, Units


class BatchPlan:
    """Random access to the windows of a run; build it with `of`.

    Attributes:
        fingerprint: What the order depends on, by names a message can use.
        phases: Which datasets are drawn from when.
        units_per_epoch: Micro-batches of an epoch, as the run begins.
        windows_per_epoch: Optimizer steps of an epoch, as the run begins.
        samples_per_epoch: Draws of an epoch, as the run begins.
    """

    def __init__(
        self,
        datasets: Sequence[Units],
        phases: Phases,
        mixing: Mixing,
        *,
        world: int,
        fingerprint: Mapping[str, str],
    ) -> None:
        self.world = world
        self.phases = phases
        self.fingerprint = dict(fingerprint)
        self._datasets = tuple(datasets)
        self._mixing = mixing
        first = phases.all[0]
        self.units_per_epoch = sum(datasets[place].count for place in first.active)
        self.windows_per_epoch = first.windows
        self.samples_per_epoch = sum(datasets[place].samples for place in first.active)

    @classmethod
    def of(
        cls,
        sources: Sequence[Drawable],
        *,
        train_batch_size: int,
        gradient_accumulation_steps: int,
        seeds: Seeds,
        data_backend_sampling: str = "auto-weighting",
        world: int = 1,
    ) -> BatchPlan:
        """The plan for `sources`.

        Args:
            sources: The datasets; a PlannedBatch names one by its place here.
            train_batch_size: Samples of one micro-batch on one rank, for datasets that do not say.
            gradient_accumulation_steps: Micro-batches of one optimizer step.
            seeds: What every order is drawn from.
            data_backend_sampling: How the datasets are mixed: a row of SAMPLINGS.
            world: Number of ranks.

        Raises:
            DataError: There is nothing to draw, or nothing in the first step.
        """
        # In the order of their names, so that the order in the user's file changes nothing.
        named = sorted(enumerate(sources), key=lambda pair: pair[1].id)
        drawn = [(i, source) for i, source in named if source.probability > 0 and len(source.keys)]
        if not drawn:
            raise DataError(
                "no dataset has a picture to draw",
                fix="give at least one dataset a probability above 0",
            )
        datasets = [
            Units(source, index, world * (source.train_batch_size or train_batch_size), seeds)
            for index, source in drawn
        ]
        accumulation = gradient_accumulation_steps
        phases = Phases(
            [source.span for _, source in drawn], [d.count for d in datasets], accumulation
        )
        if not phases.all:
            raise DataError(
                "no dataset is drawn from in step 1: each begins later",
                fix="set start_epoch and start_step of one of them to 1",
            )
        return cls(
            datasets,
            phases,
            SAMPLINGS[data_backend_sampling].load()(datasets, phases.all, accumulation, seeds),
            world=world,
            fingerprint={
                "seed": str(seeds.seed),
                "train_batch_size": str(world * train_batch_size),
                "gradient_accumulation_steps": str(accumulation),
                "data_backend_sampling": data_backend_sampling,
                **_fingerprint([source for _, source in named], train_batch_size, world),
            },
        )

    def epoch(self, step: int) -> int:
        """The 0-based epoch that optimizer step `step` (0-based) lies in."""
        return self.phases.epoch(step)

    def steps(self, epochs: int) -> int:
        """How many optimizer steps the first `epochs` epochs have."""
        return self.phases.steps(epochs)

    def check_covers(self, steps: int) -> None:
        """Make sure that a run of `steps` optimizer steps always has something to draw.

        Raises:
            DataError: From some step on no dataset is active; names it.
        """
        end = self.phases.end
        if end is not None and end[0] < steps:
            step, epoch = end
            raise DataError(
                f"no dataset is drawn from in step {step + 1} (epoch {epoch + 1}), and the run has"
                f" {steps} steps",
                fix="raise end_epoch or end_step of a dataset, let another one begin earlier, or"
                f" end the run there: max_train_steps={step}",
            )

    def seen(self, steps: int) -> frozenset[int]:
        """The places of the datasets that a run of `steps` optimizer steps draws from."""
        return frozenset(
            self._datasets[place].index
            for phase in self.phases.all
            if phase.first < steps
            for place in phase.active
        )

    def window(self, step: int, rank: int = 0) -> tuple[PlannedBatch, ...]:
        """The micro-batches of `rank` in optimizer step `step`; as many on every rank.

        A rank without a share of a unit gets the unit's first sample as a ghost of weight 0.
        """
        turns = self._mixing.turns(self.phases.at(step), step)
        sizes = [self._datasets[turn.dataset].size(turn.unit) for turn in turns]
        total = sum(sizes)
        shares, offset = [], 0
        for turn, size in zip(turns, sizes, strict=True):
            shares.append(self._share(turn, size, offset, total, rank))
            offset += size
        return tuple(shares)

    def _share(self, turn: Turn, size: int, offset: int, total: int, rank: int) -> PlannedBatch:
        low, high = size * rank // self.world, size * (rank + 1) // self.world
        ghost = low == high
        if ghost:
            low, high = 0, 1
        dataset = self._datasets[turn.dataset]
        rows, occurrences = dataset.draw(turn.epoch, turn.unit, low, high)
        return PlannedBatch(
            source=dataset.index,
            rows=rows,
            occurrences=occurrences,
            weights=(0.0 if ghost else 1.0,) * (high - low),
            positions=tuple(range(offset + low, offset + high)),
            window_samples=total,
            epoch=turn.epoch,
        )


def _fingerprint(sources: Sequence[Drawable], batch: int, world: int) -> dict[str, str]:
    """What the order depends on in each dataset; a batch is that of all ranks."""
    facts = {}
    for source in sources:
        name = f"dataset {source.id}"
        width, height = source.buckets[:, 0], source.buckets[:, 1]
        order = np.lexsort((height, width, source.keys))
        own = (source.train_batch_size or batch) * world
        facts[f"{name}: pictures"] = _digest(source.keys[order], "<u8")
        facts[f"{name}: sizes"] = _digest(source.buckets[order], "<i4")
        facts[f"{name}: repeats"] = str(source.repeats)
        facts[f"{name}: probability"] = str(source.probability)
        # The run's batch size is compared on its own.
        default = "default: " if own == batch * world else ""
        facts[f"{name}: train_batch_size"] = f"{default}{own}"
        for key, value in source.span.facts.items():
            facts[f"{name}: {key}"] = value
    return facts


def _digest(values: NDArray[np.generic], dtype: str) -> str:
    return f"{len(values)}, {key64(values.astype(dtype).tobytes()):016x}"
