"""When a run ends and what is due after which optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simpletuner.config.schedule import ScheduleSettings
    from simpletuner.validation.settings import ValidationSettings


@dataclass(frozen=True)
class Timetable:
    """Pure functions of the number of optimizer steps done.

    Args:
        total_steps: Where the run ends.
        intervals: Duty name to its interval in optimizer steps; 0 means only at the end.
    """

    total_steps: int
    intervals: dict[str, int]

    @classmethod
    def of(
        cls, schedule: ScheduleSettings, validation: ValidationSettings, windows_per_epoch: int
    ) -> Timetable:
        """The timetable of a run; `max_train_steps` alone turns epochs off."""
        epochs = schedule.num_train_epochs * windows_per_epoch
        return cls(
            schedule.max_train_steps or epochs,
            {
                "checkpoint": schedule.checkpoint_step_interval,
                "validate": validation.validation_step_interval,
            },
        )

    def due(self, step: int) -> tuple[str, ...]:
        """The duties after step `step` (1-based), in the order they were declared."""
        return tuple(
            duty
            for duty, interval in self.intervals.items()
            if self.ends(step) or (interval and step % interval == 0)
        )

    def ends(self, step: int) -> bool:
        """True if step `step` (1-based) is the last."""
        return step == self.total_steps
