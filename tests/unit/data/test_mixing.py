"""How several datasets follow each other, and how often each picture comes."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from simpletuner.data.plan import BatchPlan
from tests.contracts.test_plan import Pictures, pictures, plan_of, real


def dataset(name: str, count: int, **rest: object) -> Pictures:
    return pictures(random.Random(name), name, count, 3, **rest)


def shares(plan: BatchPlan, first: int, last: int) -> list[int]:
    """Batches of each dataset in the steps from `first` to `last`."""
    drawn = Counter(batch.source for step in range(first, last) for batch in plan.window(step))
    return [drawn[source] for source in range(max(drawn) + 1)]


def test_auto_weighting_draws_in_proportion_to_sizes_all_through_the_epoch() -> None:
    plan = plan_of(dataset("big", 3000), dataset("small", 1000), batch=1)
    for part in range(4):
        assert shares(plan, part * 1000, part * 1000 + 1000) == pytest.approx([750, 250], abs=3)


def test_auto_weighting_multiplies_sizes_by_probabilities_until_a_dataset_is_through() -> None:
    # 3000 · 0.5 : 1000 · 1 is 3 : 2, so that small is through after 2500 of 4000 steps.
    big, small = dataset("big", 3000, probability=0.5), dataset("small", 1000)
    plan = plan_of(big, small, batch=1)
    assert shares(plan, 0, 2000) == pytest.approx([1200, 800], abs=3)
    assert shares(plan, 2510, 4000) == [1490]
    assert plan.samples_per_epoch == 4000


def test_uniform_draws_by_probabilities_alone_until_a_dataset_is_through() -> None:
    big, small = dataset("big", 3000), dataset("small", 1000)
    plan = plan_of(big, small, batch=1, sampling="uniform")
    assert shares(plan, 0, 1900) == pytest.approx([950, 950], abs=3)
    assert shares(plan, 2010, 4000) == [1990]
    assert shares(plan, 0, 4000) == [3000, 1000]
    weighted = plan_of(replace(big, probability=3), small, batch=1, sampling="uniform")
    assert shares(weighted, 0, 2000) == pytest.approx([1500, 500], abs=3)


def test_probabilities_are_rates_of_datasets_of_one_size() -> None:
    chances = {"a": 0.7, "b": 0.2, "c": 0.1}
    sources = [dataset(name, 2000, probability=chance) for name, chance in chances.items()]
    plan = plan_of(*sources, batch=1)
    assert shares(plan, 0, 2000) == pytest.approx([1400, 400, 200], abs=3)
    assert plan.samples_per_epoch == 6000


def test_mix_keeps_its_shares_for_ever() -> None:
    chances = {"a": 0.7, "b": 0.2, "c": 0.1}
    counts = (900, 40, 7)
    sources = [
        dataset(name, count, probability=chance)
        for (name, chance), count in zip(chances.items(), counts, strict=True)
    ]
    plan = plan_of(*sources, batch=1, accumulation=4, sampling="mix")
    blocks = 1024 // 4
    # 716.8, 204.8 and 102.4 of 1024 by largest remainder
    for block in (0, 1, 7):
        assert shares(plan, block * blocks, (block + 1) * blocks) == [717, 205, 102]
    for part in range(8):  # and evenly within a block
        assert shares(plan, part * 32, part * 32 + 32) == pytest.approx([89.6, 25.6, 12.8], abs=2)


def test_under_mix_each_dataset_has_epochs_of_its_own_that_see_every_picture() -> None:
    a, b = dataset("a", 50, probability=3, repeats=1), dataset("b", 7, train_batch_size=2)
    plan = plan_of(a, b, batch=1, accumulation=3, sampling="mix")
    drawn: dict[tuple[int, int], list[tuple[int, int]]] = {}
    order = []
    for step in range(1500):
        window = plan.window(step)
        assert len(window) == 3
        for batch in window:
            order.append((batch.source, batch.epoch))
            drawn.setdefault((batch.source, batch.epoch), []).extend(
                (row, occurrence) for _, row, occurrence, _ in real(batch)
            )
    for source, count, passes in ((0, 50, 2), (1, 7, 1)):
        epochs = [epoch for which, epoch in order if which == source]
        assert epochs == sorted(epochs)
        for epoch in range(epochs[-1]):
            wanted = [(row, occurrence) for row in range(count) for occurrence in range(passes)]
            assert sorted(drawn[source, epoch]) == sorted(wanted)
        assert drawn[source, 0] != drawn[source, 1]


def test_an_epoch_under_mix_is_as_long_as_one_that_sees_everything() -> None:
    sources = [dataset("a", 50, probability=9), dataset("b", 30)]
    exact, mixed = plan_of(*sources), plan_of(*sources, sampling="mix")
    assert mixed.steps(3) == exact.steps(3)
    assert mixed.epoch(mixed.steps(2)) == 2


def test_under_mix_a_block_is_so_long_that_a_rare_dataset_has_its_share_of_it() -> None:
    rare = dataset("rare", 5, probability=1 / 4095)
    plan = plan_of(dataset("common", 50), rare, batch=1, sampling="mix")
    for block in range(3):
        assert shares(plan, block * 4096, (block + 1) * 4096) == [4095, 1]


def test_under_mix_many_datasets_that_hardly_ever_come_take_nothing_from_the_others() -> None:
    many = [dataset(f"rare {number}", 3, probability=1e-9) for number in range(600)]
    plan = plan_of(dataset("common", 50), *many, batch=1, sampling="mix")
    drawn = [batch.source for step in range(4096) for batch in plan.window(step)]
    # 600 of 1,048,576, the least that is drawn from any dataset
    assert drawn.count(0) >= 4096 - 8
    assert {batch.source for batch in plan.window(0)} == {0}


def test_mix_has_room_for_more_datasets_than_its_shortest_block_has_units() -> None:
    plan = plan_of(*(dataset(f"{number}", 3) for number in range(1500)), batch=1, sampling="mix")
    drawn = Counter(batch.source for step in range(2048) for batch in plan.window(step))
    assert len(drawn) == 1500
    assert set(drawn.values()) == {1, 2}


def test_batches_of_a_dataset_have_its_own_size_and_every_picture_weighs_the_same() -> None:
    plan = plan_of(dataset("a", 40), dataset("b", 40, train_batch_size=1), accumulation=5)
    seen = Counter()
    for step in range(plan.windows_per_epoch):
        window = plan.window(step)
        # What the stepper divides by is the number of pictures in the window, whoever brought them.
        assert {batch.window_samples for batch in window} == {sum(len(b.rows) for b in window)}
        assert all(set(batch.weights) == {1.0} for batch in window)
        for batch in window:
            assert len(batch.rows) <= (4, 1)[batch.source]
            seen.update((batch.source, row) for row in batch.rows)
    assert set(seen.values()) == {1}
    assert len(seen) == 80
