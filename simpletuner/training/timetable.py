"""When a run ends and what is due after which optimizer step."""

from __future__ import annotations

from collections.abc import Callable
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
        cls,
        schedule: ScheduleSettings,
        validation: ValidationSettings,
        steps: Callable[[int], int],
    ) -> Timetable:
        """The timetable of a run; `max_train_steps` alone turns epochs off.

        Args:
            schedule: When the run ends and what it leaves.
            validation: When it is looked at.
            steps: How many optimizer steps so many epochs have.
        """
        return cls(
            schedule.max_train_steps or steps(schedule.num_train_epochs),
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
