"""The log a person reads off a terminal: plain lines, no control codes, few of them."""

from __future__ import annotations

from typing import TextIO

from simpletuner.core.events import (
    CheckpointSaved,
    Event,
    ImagesMade,
    Notice,
    RunFinished,
    RunStarted,
    Stage,
    StageProgress,
    StepDone,
)
from simpletuner.tracking import wording


class PlainSink:
    """Writes a line for the start and end of each stage, and for a step every few seconds.

    Args:
        file: Where to.
        step_interval_seconds: Least time between two lines of steps; the first and the last step
            always have theirs.
    """

    def __init__(self, file: TextIO, *, step_interval_seconds: float = 10.0) -> None:
        self._file = file
        self._interval = step_interval_seconds
        self._pace = wording.Pace()
        self._started: dict[str, float] = {}
        self._last_step_line: float | None = None

    def handle(self, event: Event) -> None:
        """Write what the event says, if it is worth a line."""
        match event:
            case RunStarted():
                for name, value in event.summary.items():
                    self._line(f"{name}: {value}")
            case StageProgress():
                pass
            case Stage():
                self._stage(event)
            case StepDone():
                self._step(event)
            case CheckpointSaved():
                self._line(wording.checkpoint(event))
            case ImagesMade():
                self._line(wording.images(event))
            case Notice():
                self._line(wording.notice(event))
            case RunFinished():
                for line in event.lines:
                    self._line(line)

    def close(self) -> None:
        """Flush; the stream belongs to the caller."""
        self._file.flush()

    def _stage(self, event: Stage) -> None:
        if event.state == "finished":
            began = self._started.pop(event.stage, event.at)
            self._line(wording.stage_end(event, event.at - began))
        elif event.stage not in self._started:
            self._started[event.stage] = event.at
            count = f" ({event.total})" if event.total else ""
            self._line(f"{event.stage}{count} …")

    def _step(self, event: StepDone) -> None:
        self._pace.add(event)
        last = self._last_step_line
        if last is None or event.step == event.total_steps or event.at - last >= self._interval:
            self._last_step_line = event.at
            values = wording.step_values(event, self._pace)
            left = self._pace.left(event)
            self._line(f"step {event.step}/{event.total_steps}  {values}  {left} left")

    def _line(self, text: str) -> None:
        self._file.write(text + "\n")
        self._file.flush()
