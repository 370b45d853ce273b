"""How events read to a person: the same words on a terminal and in a log file."""

from __future__ import annotations

from collections import deque

from simpletuner.core.events import CheckpointSaved, ImagesMade, Notice, Stage, StepDone


class Pace:
    """Seconds per step over the last steps; duties (validation, saving) are no part of them."""

    def __init__(self, window_steps: int = 50) -> None:
        self._seconds: deque[float] = deque(maxlen=window_steps)

    def add(self, event: StepDone) -> None:
        """Count one step."""
        self._seconds.append(event.seconds)

    @property
    def seconds(self) -> float:
        """Mean seconds of a step; 0 before the first."""
        return sum(self._seconds) / max(len(self._seconds), 1)

    def left(self, event: StepDone) -> str:
        """The time until the last step, from here."""
        return duration(self.seconds * (event.total_steps - event.step))


def duration(seconds: float) -> str:
    """``4.2 s``, ``3:07`` (minutes), ``5:03:07`` (hours)."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def stage_end(event: Stage, seconds: float) -> str:
    """``text embeddings: 128 in 4.2 s (note)``."""
    count = f"{event.total or event.done} in " if event.total or event.done else ""
    note = f" ({event.note})" if event.note else ""
    return f"{event.stage}: {count}{duration(seconds)}{note}"


def step_values(event: StepDone, pace: Pace) -> str:
    """Loss, learning rate and pace of one step."""
    return f"loss {event.loss:.4f}  lr {event.lr:.2e}  {pace.seconds:.2f} s/step"


def checkpoint(event: CheckpointSaved) -> str:
    """Where a checkpoint is."""
    return f"step {event.step}: {event.folder.name} saved in {duration(event.seconds)}"


def images(event: ImagesMade) -> str:
    """How many pictures were made, and where they are."""
    count = (
        "1 validation image" if len(event.images) == 1 else f"{len(event.images)} validation images"
    )
    where = f" in {event.images[0].parent}" if event.images else ""
    return f"step {event.step}: {count}{where} ({duration(event.seconds)})"


def notice(event: Notice) -> str:
    """The level, unless it is the usual one, and the text."""
    return event.text if event.level == "info" else f"{event.level}: {event.text}"
