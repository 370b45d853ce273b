"""How units of several datasets follow each other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

import numpy as np

from simpletuner.core.seeds import Seeds
from simpletuner.data.permutation import fractions
from simpletuner.data.phases import Phase
from simpletuner.data.units import EPOCHS_KEPT, I32, Units

LEAST_BLOCK, MOST_BLOCK = 1 << 10, 1 << 20
"""Units within which a dataset has its share under mix: so few where each has at least one of
them, else twice as many until each has, or so many."""


@dataclass(frozen=True)
class Turn:
    """One unit of the run.

    Args:
        dataset: Its dataset, by its place in the plan.
        epoch: What its order and its draws are keyed by; the same unit never comes twice in one.
        unit: Its number in the dataset.
    """

    dataset: int
    epoch: int
    unit: int


class Mixing(Protocol):
    """What follows what."""

    def turns(self, phase: Phase, step: int) -> list[Turn]:
        """The units of optimizer step `step`, which lies in `phase`."""


def by_size(
    datasets: Sequence[Units], _phases: Sequence[Phase], accumulation: int, _seeds: Seeds
) -> Epochs:
    """Every unit once an epoch, datasets at rates of their probabilities times their units."""
    return Epochs(datasets, [d.probability * d.count for d in datasets], accumulation)


def by_probability(
    datasets: Sequence[Units], _phases: Sequence[Phase], accumulation: int, _seeds: Seeds
) -> Epochs:
    """Every unit once an epoch, datasets at rates of their probabilities."""
    return Epochs(datasets, [d.probability for d in datasets], accumulation)


def by_quota(
    datasets: Sequence[Units], phases: Sequence[Phase], accumulation: int, seeds: Seeds
) -> Quotas:
    """Shares of the probabilities all the time, each dataset with epochs of its own."""
    return Quotas(datasets, phases, accumulation, seeds)


class Epochs:
    """In each epoch every unit comes once, at rates that hold until a dataset is through.

    Args:
        datasets: The datasets of the plan.
        rates: Units of each that pass on a common clock.
        accumulation: Units of one optimizer step.
    """

    def __init__(
        self, datasets: Sequence[Units], rates: Sequence[float], accumulation: int
    ) -> None:
        self._datasets, self._rates, self._accumulation = datasets, rates, accumulation
        self._order = lru_cache(EPOCHS_KEPT)(self._interleave)

    def turns(self, phase: Phase, step: int) -> list[Turn]:
        """The units of optimizer step `step`; an epoch's last step may have fewer."""
        passed, window = divmod(step - phase.first, phase.windows)
        epoch = phase.begun + passed
        counts = [self._datasets[place].count for place in phase.active]
        before = [0, *accumulate(counts)]
        first = window * self._accumulation
        last = min(first + self._accumulation, before[-1])
        if len(phase.active) == 1:  # its own order, of which nothing has to be held
            only = phase.active[0]
            units = self._datasets[only].unit_at(epoch, np.arange(first, last))
            return [Turn(only, epoch, unit) for unit in units.tolist()]
        found = []
        for number in self._order(phase.active, epoch)[first:last].tolist():
            which = bisect_right(before, number) - 1
            found.append(Turn(phase.active[which], epoch, number - before[which]))
        return found

    def _interleave(self, active: tuple[int, ...], epoch: int) -> I32:
        """The units of an epoch, those of one dataset after the other numbered from 0 on."""
        times = [self._datasets[place].times(epoch, self._rates[place]) for place in active]
        return np.argsort(np.concatenate(times), kind="stable").astype(np.int32)


class Quotas:
    """Each dataset has its share of every block all the time, and epochs of its own.

    A block is so long that every share of it is a unit or more, as far as MOST_BLOCK allows.

    A dataset that is drawn from again goes on where it left off.

    Args:
        datasets: The datasets of the plan.
        phases: Those of the run.
        accumulation: Units of one optimizer step.
        seeds: What the order within a block is drawn from.
    """

    def __init__(
        self, datasets: Sequence[Units], phases: Sequence[Phase], accumulation: int, seeds: Seeds
    ) -> None:
        self._datasets, self._accumulation, self._seeds = datasets, accumulation, seeds
        self._shares = lru_cache(EPOCHS_KEPT)(self._share_out)
        self._block = lru_cache(EPOCHS_KEPT)(self._interleave)
        self._taken: dict[Phase, dict[int, int]] = {}
        taken = dict.fromkeys(range(len(datasets)), 0)
        for phase, following in zip(phases, (*phases[1:], None), strict=True):
            self._taken[phase] = dict(taken)
            if following is not None:
                length = (following.first - phase.first) * accumulation
                for which, place in enumerate(phase.active):
                    taken[place] += self._within(phase.active, which, length)

    def turns(self, phase: Phase, step: int) -> list[Turn]:
        """The units of optimizer step `step`."""
        first = (step - phase.first) * self._accumulation
        return [self._turn(phase, place) for place in range(first, first + self._accumulation)]

    def _turn(self, phase: Phase, place: int) -> Turn:
        block, inside = divmod(place, self._length(phase.active))
        which, number = self._block(phase.active, block)[inside].tolist()
        dataset = phase.active[which]
        units = self._datasets[dataset]
        drawn = self._taken[phase][dataset] + block * self._shares(phase.active)[which] + number
        epoch, at = divmod(drawn, units.count)
        (unit,) = units.unit_at(epoch, np.array([at])).tolist()
        return Turn(dataset, epoch, unit)

    def _within(self, active: tuple[int, ...], which: int, length: int) -> int:
        """How many of the first `length` units of a phase are of one dataset."""
        blocks, rest = divmod(length, self._length(active))
        part = self._block(active, blocks)[:rest, 0]
        return blocks * self._shares(active)[which] + int((part == which).sum())

    def _interleave(self, active: tuple[int, ...], block: int) -> I32:
        """[length, 2] place in `active` of each unit, and its number among those of its dataset."""
        times, turns = [], []
        for which, share in enumerate(self._shares(active)):
            numbers = np.arange(share)
            salt = self._seeds.key("plan quota", block, self._datasets[active[which]].id)
            times.append((numbers + fractions(numbers.astype(np.uint64), salt)) / share)
            turns.append(np.stack((np.full(share, which), numbers), axis=1))
        order = np.argsort(np.concatenate(times), kind="stable")
        return np.concatenate(turns)[order].astype(np.int32)

    def _length(self, active: tuple[int, ...]) -> int:
        return sum(self._shares(active))

    def _share_out(self, active: tuple[int, ...]) -> list[int]:
        """Units of each dataset in a block, by largest remainder, at least one."""
        chances = np.array([self._datasets[place].probability for place in active])
        chances /= chances.sum()
        length = LEAST_BLOCK
        while chances.min() * length < 1 and length < MOST_BLOCK:
            length *= 2
        # One for each, and what their chances are worth beyond that.
        beyond = np.maximum(chances * length - 1, 0)
        exact = 1 + beyond * ((length - len(active)) / max(beyond.sum(), 1))
        shares = np.floor(exact).astype(int)
        rest = np.argsort(shares - exact, kind="stable")[: length - shares.sum()]
        shares[rest] += 1
        found: list[int] = shares.tolist()
        return found
