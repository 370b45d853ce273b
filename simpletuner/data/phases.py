"""Which datasets are drawn from in which part of a run: a small table over its steps and epochs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """The part of a run in which a dataset is drawn from, counted from 1, both ends included.

    Args:
        start_epoch: Its first epoch.
        end_epoch: Its last one; None or not above 0 for no end.
        start_step: Its first optimizer step; 0 is the run's first, too.
        end_step: Its last one; None or not above 0 for no end.
    """

    start_epoch: int = 1
    end_epoch: int | None = None
    start_step: int = 1
    end_step: int | None = None

    @property
    def steps(self) -> tuple[int, int | None]:
        """The first step and the one after the last, from 0; None for no end."""
        return _half_open(self.start_step, self.end_step)

    @property
    def epochs(self) -> tuple[int, int | None]:
        """The first epoch and the one after the last, from 0; None for no end."""
        return _half_open(self.start_epoch, self.end_epoch)

    @property
    def facts(self) -> dict[str, str]:
        """Each bound by its setting's name; spellings of the same bound are one."""
        bounds = {"epoch": self.epochs, "step": self.steps}
        return {
            key: value
            for unit, (start, end) in bounds.items()
            for key, value in (
                (f"start_{unit}", str(start + 1)),
                (f"end_{unit}", "none" if end is None else str(end)),
            )
        }

    def holds(self, step: int, epoch: int) -> bool:
        """True if step `step` of epoch `epoch`, from 0, is in it."""
        return all(
            start <= at and (end is None or at < end)
            for at, (start, end) in ((step, self.steps), (epoch, self.epochs))
        )


def _half_open(start: int, end: int | None) -> tuple[int, int | None]:
    return max(start, 1) - 1, end if end and end > 0 else None


@dataclass(frozen=True)
class Phase:
    """A part of the run in which the same datasets are drawn from, in epochs of the same length.

    Args:
        first: Its first optimizer step, from 0.
        epoch: The epoch of the run that begins with it, from 0.
        begun: Epochs begun before, those included that a new phase cut short.
        windows: Optimizer steps of an epoch.
        active: The datasets, by their places.
    """

    first: int
    epoch: int
    begun: int
    windows: int
    active: tuple[int, ...]


class Phases:
    """The phases of a run, one after the other.

    A phase begins with an epoch, also where a dataset's start_step or end_step falls inside one:
    that epoch is begun anew and keeps its number, so that only whole epochs are counted.

    Args:
        spans: When each dataset is drawn from.
        units: Units of each in an epoch, at least one.
        accumulation: Units of one optimizer step.

    Attributes:
        all: The phases.
        end: The step and its epoch, from 0, from which on nothing is drawn; None without such.
    """

    def __init__(self, spans: Sequence[Span], units: Sequence[int], accumulation: int) -> None:
        found: list[Phase] = []
        at: tuple[int, int] | None = (0, 0)
        begun = 0
        while at is not None and (active := _active(spans, *at)):
            windows = -(-sum(units[place] for place in active) // accumulation)
            found.append(Phase(*at, begun, windows, active))
            at = _change(spans, found[-1])
            if at is not None:
                begun += -(-(at[0] - found[-1].first) // windows)
        self.all = tuple(found)
        self.end = at
        self._firsts = [phase.first for phase in found]

    def at(self, step: int) -> Phase:
        """The phase of optimizer step `step`, from 0."""
        return self.all[bisect_right(self._firsts, step) - 1]

    def epoch(self, step: int) -> int:
        """The epoch, from 0, of optimizer step `step`."""
        phase = self.at(step)
        return phase.epoch + (step - phase.first) // phase.windows

    def steps(self, epochs: int) -> int:
        """How many optimizer steps the first `epochs` epochs have; 0 for none."""
        if not epochs:
            return 0
        last = next(phase for phase in reversed(self.all) if phase.epoch < epochs)
        return last.first + (epochs - last.epoch) * last.windows


def _active(spans: Sequence[Span], step: int, epoch: int) -> tuple[int, ...]:
    return tuple(place for place, span in enumerate(spans) if span.holds(step, epoch))


def _change(spans: Sequence[Span], phase: Phase) -> tuple[int, int] | None:
    """The first step after `phase` began, and its epoch, with other datasets; None without any."""
    for step, epoch in sorted(set(_borders(spans, phase))):
        if _active(spans, step, epoch) != phase.active:
            return step, epoch
    return None


def _borders(spans: Sequence[Span], phase: Phase) -> Iterator[tuple[int, int]]:
    """Every (step, epoch) after the phase began at which some dataset begins or ends."""
    for span in spans:
        for step in span.steps:
            if step is not None and step > phase.first:
                yield step, phase.epoch + (step - phase.first) // phase.windows
        for epoch in span.epochs:
            if epoch is not None and epoch > phase.epoch:
                yield phase.first + (epoch - phase.epoch) * phase.windows, epoch
