"""What every plan promises, over random datasets, batch shapes and worlds."""

from __future__ import annotations

import random
import threading
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest

from simpletuner.core.errors import DataError
from simpletuner.core.seeds import Seeds
from simpletuner.core.types import PlannedBatch
from simpletuner.data import units as data_units
from simpletuner.data.permutation import mix
from simpletuner.data.phases import Span
from simpletuner.data.plan import BatchPlan

EVERYWHERE = Span()
SIDES = (256, 320, 384, 448, 512, 576, 640)


@dataclass(frozen=True)
class Pictures:
    id: str
    keys: np.ndarray
    buckets: np.ndarray
    repeats: int = 0
    probability: float = 1.0
    train_batch_size: int | None = None
    span: Span = EVERYWHERE


@dataclass(frozen=True)
class Case:
    """The batch sizes are those of all ranks."""

    sources: tuple[Pictures, ...]
    unit: int
    accumulation: int
    epoch: int
    seed: int
    sampling: str = "auto-weighting"

    def plan(self, world: int = 1) -> BatchPlan:
        return BatchPlan.of(
            [
                replace(source, train_batch_size=(source.train_batch_size or 0) // world or None)
                for source in self.sources
            ],
            train_batch_size=self.unit // world,
            gradient_accumulation_steps=self.accumulation,
            data_backend_sampling=self.sampling,
            seeds=Seeds(self.seed),
            world=world,
        )

    def batch(self, source: int) -> int:
        return self.sources[source].train_batch_size or self.unit

    @property
    def worlds(self) -> tuple[int, ...]:
        return tuple(world for world in (1, 2, 4) if self.unit % world == 0)


def pictures(rng: random.Random, name: str, count: int, buckets: int, **rest: object) -> Pictures:
    sizes = [(rng.choice(SIDES), rng.choice(SIDES)) for _ in range(buckets)]
    keys = np.array([rng.getrandbits(64) for _ in range(count)], np.uint64)
    if count > 3:
        keys[1] = keys[0]  # the same bytes twice
    chosen = np.array([rng.choice(sizes) for _ in range(count)], np.int32)
    return Pictures(name, keys, chosen, **rest)  # type: ignore[arg-type]


def case(number: int) -> Case:
    rng = random.Random(number)
    count = rng.randint(1, 3)
    weighted = rng.random() < 0.3
    sources = tuple(
        pictures(
            rng,
            f"set {i}",
            rng.randint(1, 60),
            rng.randint(1, 12),
            repeats=rng.randint(0, 3),
            probability=rng.choice((0.2, 0.7, 1.0)) if weighted else 1.0,
            train_batch_size=rng.choice((None, None, 4, 8)),
        )
        for i in range(count)
    )
    return Case(
        sources,
        rng.choice((1, 4, 8, 12)),
        rng.randint(1, 5),
        rng.choice((0, 3)),
        rng.randint(0, 9),
        rng.choice(("auto-weighting", "uniform")),
    )


CASES = [pytest.param(case(number), id=str(number)) for number in range(100)]
MIXED = [
    pytest.param(replace(case(number), sampling="mix"), id=f"mix {number}") for number in range(30)
]


def epoch_of(plan: BatchPlan, epoch: int, rank: int = 0) -> list[tuple[PlannedBatch, ...]]:
    first = epoch * plan.windows_per_epoch
    return [plan.window(step, rank) for step in range(first, first + plan.windows_per_epoch)]


def real(batch: PlannedBatch) -> list[tuple[int, int, int, int]]:
    """(dataset, row, occurrence, position) of the samples that are no ghosts."""
    return [
        (batch.source, row, occurrence, position)
        for row, occurrence, position, weight in zip(
            batch.rows, batch.occurrences, batch.positions, batch.weights, strict=True
        )
        if weight
    ]


def units(plans: list[list[tuple[PlannedBatch, ...]]]) -> list[list[tuple[int, int, int]]]:
    """The draws of each unit, put together from the shares of all ranks."""
    found = []
    for windows in zip(*plans, strict=True):
        for shares in zip(*windows, strict=True):
            found.append([draw[:3] for share in shares for draw in real(share)])
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_sample_comes_repeats_plus_one_times_per_epoch_on_exactly_one_rank(
    case: Case,
) -> None:
    for world in case.worlds:
        plan = case.plan(world)
        seen = Counter(
            draw[:3]
            for rank in range(world)
            for window in epoch_of(plan, case.epoch, rank)
            for batch in window
            for draw in real(batch)
        )
        wanted = Counter(
            (index, row, occurrence)
            for index, source in enumerate(case.sources)
            for row in range(len(source.keys))
            for occurrence in range(source.repeats + 1)
        )
        assert seen == wanted
        assert plan.samples_per_epoch == wanted.total()


@pytest.mark.parametrize("case", [*CASES, *MIXED])
def test_all_ranks_run_the_same_shapes_and_know_the_whole_window(case: Case) -> None:
    for world in case.worlds:
        plan = case.plan(world)
        for step in range(plan.windows_per_epoch):
            windows = [plan.window(step, rank) for rank in range(world)]
            assert len({len(window) for window in windows}) == 1
            assert 1 <= len(windows[0]) <= case.accumulation
            for shares in zip(*windows, strict=True):
                assert len({share.source for share in shares}) == 1
                source = case.sources[shares[0].source]
                shapes = {tuple(source.buckets[row]) for share in shares for row in share.rows}
                assert len(shapes) == 1
                most = case.batch(shares[0].source) // world
                assert all(1 <= len(share.rows) <= most for share in shares)
            total = sum(weight for w in windows for batch in w for weight in batch.weights)
            assert {batch.window_samples for w in windows for batch in w} == {total}


@pytest.mark.parametrize("case", [*CASES, *MIXED])
def test_positions_number_the_window_without_gap_over_all_ranks(case: Case) -> None:
    for world in case.worlds:
        plan = case.plan(world)
        for step in range(plan.windows_per_epoch):
            window = [batch for rank in range(world) for batch in plan.window(step, rank)]
            taken = sorted(draw[3] for batch in window for draw in real(batch))
            assert taken == list(range(window[0].window_samples))
            assert all(0 <= p < len(taken) for batch in window for p in batch.positions)


@pytest.mark.parametrize("case", [*CASES, *MIXED])
def test_the_sequence_of_units_does_not_depend_on_the_number_of_ranks(case: Case) -> None:
    sequences = []
    for world in case.worlds:
        plan = case.plan(world)
        sequences.append(units([epoch_of(plan, case.epoch, rank) for rank in range(world)]))
        assert plan.fingerprint == case.plan().fingerprint
    assert all(sequence == sequences[0] for sequence in sequences)


@pytest.mark.parametrize("case", [*CASES, *MIXED])
def test_a_window_is_the_same_from_a_fresh_plan_and_in_any_order_of_asking(case: Case) -> None:
    plan = case.plan()
    steps = list(range(2 * plan.windows_per_epoch))
    straight = [plan.window(step) for step in steps]
    random.Random(1).shuffle(steps)
    for step in steps[:8]:
        assert case.plan().window(step) == straight[step]
        assert plan.window(step) == straight[step]


@pytest.mark.parametrize("case", CASES)
def test_an_epoch_is_told_by_its_windows_and_draws_its_samples(case: Case) -> None:
    plan = case.plan()
    drawn = [0, 0]
    for step in range(2 * plan.windows_per_epoch):
        epoch = step // plan.windows_per_epoch
        assert plan.epoch(step) == epoch
        window = plan.window(step)
        assert {batch.epoch for batch in window} == {epoch}
        drawn[epoch] += window[0].window_samples
    assert drawn == [plan.samples_per_epoch] * 2


@pytest.mark.parametrize("case", [*CASES, *MIXED])
def test_the_order_of_files_and_of_datasets_changes_nothing(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    orders = [rng.permutation(len(source.keys)) for source in case.sources]
    moved = [
        replace(source, keys=source.keys[order], buckets=source.buckets[order])
        for source, order in zip(case.sources, orders, strict=True)
    ]
    other = replace(case, sources=tuple(reversed(moved)))

    def names(case: Case) -> list[list[tuple[str, int, int]]]:
        return [
            [(case.sources[s].id, int(case.sources[s].keys[row]), o) for s, row, o in unit]
            for unit in units([epoch_of(case.plan(), case.epoch)])
        ]

    assert names(other) == names(case)
    assert other.plan().fingerprint == case.plan().fingerprint


def one(count: int, **rest: object) -> Pictures:
    return pictures(random.Random(5), "one", count, 1, **rest)


EARLY = pictures(random.Random(6), "early", 4, 1)


def plan_of(
    *sources: Pictures,
    batch: int = 4,
    accumulation: int = 1,
    seed: int = 0,
    sampling: str = "auto-weighting",
) -> BatchPlan:
    return BatchPlan.of(
        sources,
        train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        data_backend_sampling=sampling,
        seeds=Seeds(seed),
    )


def test_one_more_picture_leaves_the_order_of_the_others() -> None:
    more = one(41, repeats=1)
    fewer = replace(more, keys=more.keys[:-1], buckets=more.buckets[:-1])

    def draws(source: Pictures) -> list[tuple[int, int]]:
        plan = plan_of(source, batch=100)
        return [(r, o) for batch in plan.window(0) for _, r, o, _ in real(batch)]

    assert [draw for draw in draws(more) if draw[0] != 40] == draws(fewer)


def test_epochs_and_seeds_shuffle_anew() -> None:
    source = one(64)
    orders = [
        [draw for window in epoch_of(plan_of(source, seed=seed), epoch) for draw in window]
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    rows = [[row for batch in order for row in batch.rows] for order in orders]
    assert rows[0] != rows[1]
    assert rows[0] != rows[2]


def test_repeats_fill_batches_across_passes() -> None:
    plan = plan_of(one(3, repeats=99))
    assert plan.units_per_epoch == 75
    assert all(len(batch.rows) == 4 for window in epoch_of(plan, 0) for batch in window)


def test_a_rank_without_a_share_gets_a_ghost() -> None:
    plan = BatchPlan.of(
        [one(1)], train_batch_size=2, gradient_accumulation_steps=1, seeds=Seeds(0), world=4
    )
    shares = [plan.window(0, rank)[0] for rank in range(4)]
    assert sorted(share.weights for share in shares) == [(0.0,), (0.0,), (0.0,), (1.0,)]
    assert {share.rows for share in shares} == {(0,)}
    assert {share.window_samples for share in shares} == {1}


def test_probability_zero_is_never_drawn() -> None:
    plan = plan_of(one(8), replace(one(8), id="off", probability=0.0))
    assert {batch.source for window in epoch_of(plan, 0) for batch in window} == {0}
    assert plan.samples_per_epoch == 8


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(DataError, match="no dataset has a picture to draw"):
        plan_of(replace(one(8), probability=0.0))


def test_the_fingerprint_names_what_changed() -> None:
    base = one(8)
    sizes = base.buckets.copy()
    sizes[0] += 64
    keys = base.keys.copy()
    keys[0] += 1
    changes = {
        "dataset one: pictures": plan_of(replace(base, keys=keys)),
        "dataset one: sizes": plan_of(replace(base, buckets=sizes)),
        "dataset one: repeats": plan_of(replace(base, repeats=1)),
        "dataset one: probability": plan_of(replace(base, probability=0.5)),
        "train_batch_size": plan_of(base, batch=2),
        "gradient_accumulation_steps": plan_of(base, accumulation=2),
        "seed": plan_of(base, seed=1),
        "data_backend_sampling": plan_of(base, sampling="mix"),
        "dataset one: train_batch_size": plan_of(replace(base, train_batch_size=2)),
        "dataset one: start_epoch": plan_of(replace(base, span=Span(start_epoch=2)), EARLY),
        "dataset one: end_epoch": plan_of(replace(base, span=Span(end_epoch=2))),
        "dataset one: start_step": plan_of(replace(base, span=Span(start_step=2)), EARLY),
        "dataset one: end_step": plan_of(replace(base, span=Span(end_step=2))),
    }
    before = plan_of(base).fingerprint
    assert set(before) == set(changes)
    for name, plan in changes.items():
        now = {k: v for k, v in plan.fingerprint.items() if "early" not in k}
        found = {k for k, v in now.items() if v != before[k]}
        # A dataset that takes the run's batch size says so, and a resume compares the run's.
        assert found - (
            {"dataset one: train_batch_size"} if name == "train_batch_size" else set()
        ) == {name}


def test_other_spellings_of_the_same_plan_have_the_same_fingerprint() -> None:
    base, same = one(8), Span(end_epoch=0, start_step=0, end_step=-1)
    assert plan_of(replace(base, span=same)).fingerprint == plan_of(base).fingerprint
    assert plan_of(replace(base, train_batch_size=4)).fingerprint == plan_of(base).fingerprint


def test_the_hash_is_splitmix64() -> None:
    # The published stream of splitmix64 seeded with 0: state k · 0x9E3779B97F4A7C15, finalised.
    state = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [hex(value) for value in mix(state, 0).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_two_threads_may_ask_at_once() -> None:
    plan = plan_of(one(200), batch=2)
    wanted = [plan_of(one(200), batch=2).window(step) for step in range(300)]
    found: dict[int, list[tuple[PlannedBatch, ...]]] = {}

    def ask(number: int) -> None:
        found[number] = [plan.window(step) for step in range(300)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(windows == wanted for windows in found.values())


@pytest.mark.slow
def test_large_buckets_and_many_units_are_drawn_once_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beyond what is sorted, here 100 pictures of one size, and as many units."""
    monkeypatch.setattr(data_units, "SORTED", 100)
    count = 1_003
    source = one(count, repeats=1)
    plan = plan_of(source, batch=1, accumulation=10)
    seen = np.zeros((count, 2), int)
    for window in epoch_of(plan, 0):
        for batch in window:
            seen[batch.rows[0], batch.occurrences[0]] += 1
    assert (seen == 1).all()
    first, again = (plan_of(source, batch=1).window(step)[0].rows for step in (7, 8))
    assert first != again
