"""When datasets are drawn from: in epochs and optimizer steps, whatever the batches."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from simpletuner.core.errors import DataError
from simpletuner.data.phases import Span
from simpletuner.data.plan import BatchPlan
from tests.contracts.test_plan import Pictures, pictures, plan_of

ALWAYS = Span()


def dataset(name: str, count: int, span: Span = ALWAYS, **rest: object) -> Pictures:
    return pictures(random.Random(name), name, count, 3, span=span, **rest)


def sources(plan: BatchPlan, steps: range) -> list[set[int]]:
    """The datasets of each step, numbered from 1."""
    return [{batch.source for batch in plan.window(step - 1)} for step in steps]


def steps_with(plan: BatchPlan, source: int, last: int) -> list[int]:
    """The steps up to `last`, from 1, in which a dataset is drawn from."""
    found = sources(plan, range(1, last + 1))
    return [step for step, drawn in enumerate(found, 1) if source in drawn]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("sampling", ["auto-weighting", "uniform", "mix"])
def test_start_step_and_end_step_count_optimizer_steps(accumulation: int, sampling: str) -> None:
    early = dataset("early", 300, Span(end_step=20))
    late = dataset("late", 300, Span(start_step=21))
    plan = plan_of(early, late, batch=1, accumulation=accumulation, sampling=sampling)
    assert sources(plan, range(1, 41)) == [{0}] * 20 + [{1}] * 20


def test_a_fresh_plan_after_a_resume_counts_the_same_steps() -> None:
    early, late = dataset("early", 30, Span(end_step=20)), dataset("late", 30, Span(start_step=7))
    plan = plan_of(early, late, accumulation=2)
    straight = [plan.window(step) for step in range(40)]
    for step in (25, 6, 20, 19, 5, 39):
        assert plan_of(early, late, accumulation=2).window(step) == straight[step]


def test_start_epoch_and_end_epoch_are_both_included() -> None:
    # 10 batches an epoch of `always`, with 5 more of `part` in the epochs 2 and 3.
    always, part = dataset("always", 40), dataset("part", 20, Span(start_epoch=2, end_epoch=3))
    plan = plan_of(replace(always, buckets=always.buckets * 0 + 64), one_size(part))
    assert [plan.epoch(step) for step in (0, 9, 10, 24, 25, 39, 40, 49, 50)] == [
        0, 0, 1, 1, 2, 2, 3, 3, 4
    ]  # fmt: skip
    assert [plan.steps(epochs) for epochs in range(6)] == [0, 10, 25, 40, 50, 60]
    drawn = steps_with(plan, 1, 60)
    assert len(drawn) == 10
    assert 11 <= min(drawn) <= max(drawn) <= 40


def one_size(source: Pictures) -> Pictures:
    return replace(source, buckets=source.buckets * 0 + 64)


def test_a_step_inside_an_epoch_begins_that_epoch_anew_and_it_keeps_its_number() -> None:
    # 10 steps an epoch; with `late` from step 14 on 15.
    always, late = one_size(dataset("always", 40)), one_size(dataset("late", 20))
    plan = plan_of(always, replace(late, span=Span(start_step=14)))
    assert [plan.epoch(step - 1) for step in (10, 11, 13, 14, 28, 29)] == [0, 1, 1, 1, 1, 2]
    assert [plan.steps(epochs) for epochs in (1, 2, 3)] == [10, 28, 43]
    whole = Counter(
        (batch.source, row)
        for step in range(13, 28)
        for batch in plan.window(step)
        for row in batch.rows
    )
    assert len(whole) == 60
    assert set(whole.values()) == {1}


def test_no_epoch_repeats_the_draws_of_one_that_was_cut_short() -> None:
    always, late = one_size(dataset("always", 40)), one_size(dataset("late", 20))
    plan = plan_of(always, replace(late, span=Span(start_step=14)))
    keys = [{batch.epoch for batch in plan.window(step)} for step in range(43)]
    assert [keys[step] for step in (0, 9, 10, 12, 13, 27, 28)] == [
        {0}, {0}, {1}, {1}, {2}, {2}, {3}
    ]  # fmt: skip


def test_a_border_that_changes_nothing_begins_nothing_anew() -> None:
    always = one_size(dataset("always", 40))
    off = dataset("off", 20, Span(start_step=5, start_epoch=3, end_step=12))
    assert [len(plan_of(always, off).phases.all), plan_of(always, off).steps(4)] == [1, 40]


def test_both_bounds_have_to_be_met() -> None:
    always = one_size(dataset("always", 40))
    both = one_size(dataset("both", 20, Span(start_step=5, start_epoch=2)))
    plan = plan_of(always, both)
    assert steps_with(plan, 1, 10) == []
    assert plan.phases.all[1].first == 10


@pytest.mark.parametrize("number", range(40))
def test_at_every_step_only_those_in_their_span_are_drawn_and_whole_epochs_see_them_all(
    number: int,
) -> None:
    rng = random.Random(number)
    spans = [ALWAYS, random_span(rng), random_span(rng)]
    found = [dataset(str(i), rng.randint(5, 30), span) for i, span in enumerate(spans)]
    plan = plan_of(*found, batch=rng.choice((1, 2)), accumulation=rng.choice((1, 3)))
    epochs: dict[int, list[int]] = {}
    for step in range(plan.steps(6)):
        drawn = {batch.source for batch in plan.window(step)}
        allowed = {
            i for i, span in enumerate(spans) if within(span, step + 1, plan.epoch(step) + 1)
        }
        assert drawn <= allowed
        (key,) = {batch.epoch for batch in plan.window(step)}
        epochs.setdefault(key, []).append(step)
    assert sorted(epochs) == list(range(len(epochs)))
    for epoch, steps in runs_of(plan, epochs):
        allowed = {i for i, s in enumerate(spans) if within(s, steps[0] + 1, epoch + 1)}
        seen = Counter(
            (b.source, row) for step in steps for b in plan.window(step) for row in b.rows
        )
        assert set(seen.values()) == {1}
        assert {source for source, _ in seen} == allowed
        assert len(seen) == sum(len(found[i].keys) for i in allowed)


def runs_of(plan: BatchPlan, epochs: dict[int, list[int]]) -> Iterator[tuple[int, list[int]]]:
    """The whole epochs: number and steps of the last time each was begun."""
    last = {plan.epoch(steps[0]): steps for steps in epochs.values()}
    assert sorted(last) == list(range(6))
    yield from last.items()


def random_span(rng: random.Random) -> Span:
    start_epoch, start_step = rng.randint(1, 3), rng.choice((0, 1, 5, 17))
    return Span(
        start_epoch,
        rng.choice((None, 0, start_epoch + rng.randint(0, 2))),
        start_step,
        rng.choice((None, -1, start_step + rng.randint(1, 30))),
    )


def within(span: Span, step: int, epoch: int) -> bool:
    """As the settings say it, counted from 1."""
    ends = [end if end and end > 0 else 10**9 for end in (span.end_step, span.end_epoch)]
    return span.start_step <= step <= ends[0] and span.start_epoch <= epoch <= ends[1]


def test_under_mix_a_dataset_goes_on_where_it_left_off() -> None:
    a = dataset("a", 64, Span(end_step=50))
    b = one_size(dataset("b", 1000))
    plan = plan_of(a, b, batch=1, accumulation=3, sampling="mix")
    rows = [
        row
        for step in range(300)
        for batch in plan.window(step)
        if batch.source == 1
        for row in batch.rows
    ]
    # 75 in the first 50 steps, 750 in the next 250: none twice before all have come.
    assert len(rows) == len(set(rows)) == pytest.approx(825, abs=2)


def test_a_run_with_nothing_to_draw_in_some_step_is_refused_with_the_step() -> None:
    early, late = dataset("early", 40, Span(end_step=20)), dataset("late", 40, Span(start_step=31))
    plan = plan_of(early, late)
    plan.check_covers(20)
    with pytest.raises(DataError, match=r"no dataset is drawn from in step 21 \(epoch 2\), and"):
        plan.check_covers(21)
    ends = plan_of(one_size(dataset("ends", 40, Span(end_epoch=2))))
    with pytest.raises(DataError, match=r"in step 21 \(epoch 3\)") as raised:
        ends.check_covers(ends.steps(3))
    assert "max_train_steps=20" in str(raised.value.fix)


def test_nothing_to_begin_with_is_refused() -> None:
    with pytest.raises(DataError, match="no dataset is drawn from in step 1: each begins later"):
        plan_of(dataset("a", 8, Span(start_epoch=2)), dataset("b", 8, Span(start_step=2)))


def test_the_datasets_a_run_sees_are_known() -> None:
    late = dataset("late", 8, Span(start_step=31))
    plan = plan_of(dataset("never", 8, probability=0), late, dataset("first", 8))
    assert plan.seen(30) == {2}
    assert plan.seen(31) == {1, 2}
