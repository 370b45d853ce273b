"""What is due after which step."""

from __future__ import annotations

from simpletuner.config.schedule import ScheduleSettings
from simpletuner.training.timetable import Timetable
from simpletuner.validation.settings import ValidationSettings


def table(**schedule: int) -> Timetable:
    settings = ScheduleSettings(**{"checkpoint_step_interval": 4, **schedule})
    return Timetable.of(settings, ValidationSettings(validation_step_interval=6), lambda n: 5 * n)


def test_steps_alone_turn_epochs_off() -> None:
    assert table(max_train_steps=7, num_train_epochs=0).total_steps == 7
    assert table(num_train_epochs=3).total_steps == 15


def test_duties_are_due_at_their_intervals_and_at_the_end_checkpoint_first() -> None:
    found = table(max_train_steps=13, num_train_epochs=0)
    due = {step: found.due(step) for step in range(1, 14) if found.due(step)}
    assert due == {
        4: ("checkpoint",),
        6: ("validate",),
        8: ("checkpoint",),
        12: ("checkpoint", "validate"),
        13: ("checkpoint", "validate"),
    }


def test_an_interval_of_zero_means_at_the_end_only() -> None:
    found = table(max_train_steps=5, num_train_epochs=0, checkpoint_step_interval=0)
    assert [found.due(step) for step in range(1, 6)][:4] == [()] * 4
    assert found.due(5) == ("checkpoint", "validate")
