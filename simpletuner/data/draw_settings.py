"""Which pictures are drawn when, and how often: these keys of the settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from simpletuner.core.section import Section, setting
from simpletuner.data.phases import Span
from simpletuner.data.sampling import SAMPLINGS

MOST = 1_000_000_000
"""No run has an epoch or a step, and no dataset a picture, of a higher number."""


class DrawSettings(Section):
    """What is said of all datasets together."""

    data_backend_sampling: str = setting("auto-weighting", table=SAMPLINGS)
    """How batches of several datasets follow each other."""


class DatasetDrawSettings(Section):
    """What is said of drawing from one dataset."""

    repeats: int = setting(0, ge=0, le=1_000_000)
    """How often each picture is seen again within an epoch; 0 is once."""

    probability: float = setting(1.0, ge=0, le=MOST)
    """How often this dataset is drawn from, beside the others, in the way of
    data_backend_sampling; larger is more often, 0 is never. However small, under mix it is at
    least one batch of 1,048,576."""

    max_num_samples: int | None = setting(None, ge=1, le=MOST, unit="pictures")
    """Train on this many pictures only: those that a hash of their contents chooses, so that
    renaming files changes nothing and a new file takes the place of one at most."""

    train_batch_size: int | None = setting(None, ge=1, le=1_000_000, unit="pictures")
    """This dataset's own batch size, without it the run's; every picture weighs the same,
    whatever the size of its batch."""

    start_epoch: int = setting(1, ge=1, le=MOST, unit="epochs")
    """The epoch in which this dataset is first seen; with start_step, both have to be reached. At
    least one dataset has to be drawn from at every step of a run."""

    end_epoch: int | None = setting(None, ge=-1, le=MOST, unit="epochs")
    """The epoch in which this dataset is last seen; 0 or -1 for no end."""

    start_step: int = setting(0, ge=0, le=MOST, unit="optimizer steps")
    """The step in which this dataset is first seen, 0 and 1 being the run's first; inside an epoch,
    that epoch begins anew with it and keeps its number."""

    end_step: int | None = setting(None, ge=-1, le=MOST, unit="optimizer steps")
    """The step in which this dataset is last seen, 0 or -1 for no end; inside an epoch, that epoch
    begins anew without it and keeps its number."""

    @property
    def span(self) -> Span:
        """The part of the run in which the dataset is drawn from."""
        return Span(self.start_epoch, self.end_epoch, self.start_step, self.end_step)


def draw_contradictions(entry: DatasetDrawSettings) -> Iterator[tuple[str, str]]:
    """What does not fit together in an entry: a key, and what to do."""
    for unit, (start, end) in (("epoch", entry.span.epochs), ("step", entry.span.steps)):
        if end is not None and end <= start:
            yield (
                f"end_{unit}",
                f"{end} is before start_{unit} ({start + 1}), so it would never be drawn from",
            )


def gaps(
    entries: Iterable[DatasetDrawSettings], *, epochs: int, steps: int
) -> Iterator[tuple[str, str]]:
    """Where a run has nothing to draw, as far as that can be told without the pictures.

    Args:
        entries: Of all datasets.
        epochs: Of the run; 0 where it ends with a step.
        steps: Of the run; 0 where it ends with an epoch.

    Yields:
        The key that makes the gap, and what to do.
    """
    spans = [entry.span for entry in entries if entry.probability > 0]
    if not spans:
        return
    for unit, last, bounds in (
        ("epoch", epochs, [span.epochs for span in spans]),
        ("step", steps, [span.steps for span in spans]),
    ):
        at = 0
        for start, end in sorted(bounds, key=lambda bound: bound[0]):
            if start <= at:
                at = max(at, max(last, 1) if end is None else end)
        if at < max(last, 1):
            none = f"no dataset is drawn from in {unit} {at + 1}"
            if at == 0:
                yield f"start_{unit}", f"{none}; let one begin with it"
            else:
                yield f"end_{unit}", f"{none}; let one last longer, or end the run with {unit} {at}"
