"""What a run would train on: found, usable, left out and why, sizes, and the length of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simpletuner.data.buckets import group
from simpletuner.data.excluded import Excluded
from simpletuner.data.plan import BatchPlan
from simpletuner.data.source import DataSource


@dataclass(frozen=True)
class Bucket:
    """Pictures of one size.

    Args:
        width: In px, as the encoder sees it.
        height: The same.
        pictures: How many have this size.
        samples: How often one of them is drawn within an epoch.
    """

    width: int
    height: int
    pictures: int
    samples: int


@dataclass(frozen=True)
class DatasetReport:
    """One dataset.

    Args:
        id: Its name.
        trained: It is trained on; false for one that is kept to measure by.
        found: Pictures in its folder.
        usable: Those that are trained on.
        excluded: Why the others are not, each reason once.
        enlarged: Usable ones that are smaller than the size they are trained at.
        merged: Usable ones that were moved out of a rare bucket into a fuller one.
        buckets: The sizes, the fullest first.
    """

    id: str
    trained: bool
    found: int
    usable: int
    excluded: tuple[Excluded, ...]
    enlarged: int
    merged: int
    buckets: tuple[Bucket, ...]

    @property
    def samples(self) -> int:
        """Draws within an epoch."""
        return sum(bucket.samples for bucket in self.buckets)

    @classmethod
    def of(cls, source: DataSource) -> DatasetReport:
        """The report of one dataset."""
        sizes, number = group(source.buckets)
        counts = np.bincount(number, minlength=len(sizes))
        order = np.argsort(-counts, kind="stable").tolist()
        trained = source.settings.role != "eval"
        passes = source.repeats + 1 if trained else 0
        buckets = (
            Bucket(int(sizes[i, 0]), int(sizes[i, 1]), int(counts[i]), int(counts[i]) * passes)
            for i in order
        )
        return cls(
            id=source.id,
            trained=trained,
            found=source.found,
            usable=len(source),
            excluded=source.excluded(),
            enlarged=source.enlarged,
            merged=source.merged,
            buckets=tuple(buckets),
        )


@dataclass(frozen=True)
class DataReport:
    """All datasets of a run.

    Args:
        datasets: Each of them.
        steps_per_epoch: Optimizer steps.
        samples_per_epoch: Pictures seen, repeats counted.
    """

    datasets: tuple[DatasetReport, ...]
    steps_per_epoch: int
    samples_per_epoch: int

    @classmethod
    def of(cls, sources: Sequence[DataSource], plan: BatchPlan) -> DataReport:
        """The report of a run's datasets and its plan."""
        return cls(
            tuple(DatasetReport.of(source) for source in sources),
            plan.windows_per_epoch,
            plan.samples_per_epoch,
        )

    def lines(self, most: int = 8) -> list[str]:
        """The report as text; at most so many sizes and reasons of each dataset."""
        lines = []
        for report in self.datasets:
            lines += _lines(report, most)
        steps, samples = self.steps_per_epoch, self.samples_per_epoch
        return [*lines, f"an epoch: {steps:,} steps, {samples:,} samples"]


def _lines(report: DatasetReport, most: int) -> list[str]:
    use = "used" if report.trained else "kept to measure by, which this version does not do yet"
    lines = [f"dataset {report.id}: {report.usable:,} of {report.found:,} pictures are {use}"]
    for excluded in report.excluded[:most]:
        lines.append(
            f"  left out {excluded.count:>7,}  {excluded.reason}, such as {excluded.example}"
        )
    if len(report.excluded) > most:
        rest = sum(excluded.count for excluded in report.excluded[most:])
        lines.append(f"  left out {rest:>7,}  for {len(report.excluded) - most} more reasons")
    for bucket in report.buckets[:most]:
        size = f"{bucket.width}x{bucket.height}"
        samples = f"  {bucket.samples:>7,} samples an epoch" if report.trained else ""
        lines.append(f"  {size:>11}  {bucket.pictures:>7,} pictures{samples}")
    if len(report.buckets) > most:
        rest = sum(bucket.pictures for bucket in report.buckets[most:])
        lines.append(f"  {len(report.buckets) - most} more sizes  {rest:,} pictures")
    if report.enlarged:
        lines.append(f"  {report.enlarged:,} of them are enlarged to reach their size")
    if report.merged:
        lines.append(f"  {report.merged:,} of them are of rare sizes, cropped to a fuller one")
    return lines
