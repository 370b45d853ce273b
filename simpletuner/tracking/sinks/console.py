"""The live view on a terminal: stages with a bar and an ETA, one progress line while training."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from simpletuner.core.events import (
    CheckpointSaved,
    Event,
    ImagesMade,
    Notice,
    RunFailed,
    RunFinished,
    RunStarted,
    Stage,
    StepDone,
)
from simpletuner.tracking import wording


class ConsoleSink:
    """Shows a run on a terminal; what is over scrolls up as ordinary lines.

    Args:
        console: A terminal. Off a terminal use `PlainSink`.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=40, pulse_style="bar.back"),
            TextColumn("{task.fields[values]}", markup=False),
            console=console,
            refresh_per_second=4,
        )
        self._pace = wording.Pace()
        self._stages: dict[str, tuple[TaskID, float]] = {}
        self._steps: TaskID | None = None

    def handle(self, event: Event) -> None:
        """Show what the event says."""
        match event:
            case RunStarted():
                self._summary(event)
            case Stage():
                self._stage(event)
            case StepDone():
                self._step(event)
            case CheckpointSaved():
                self._line(wording.checkpoint(event), "dim")
            case ImagesMade():
                self._line(wording.images(event), "dim")
            case Notice():
                self._line(wording.notice(event), "yellow" if event.level == "warning" else "")
            case RunFinished():
                self.close()
                self._console.rule(style="green")
                for line in event.lines:
                    self._line(line)
            case RunFailed():  # the command line prints the message
                self.close()

    def close(self) -> None:
        """End the live part and give the cursor back."""
        self._progress.stop()

    def _summary(self, event: RunStarted) -> None:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in event.summary.items():
            grid.add_row(Text(name), Text(value))
        self._console.print(grid)

    def _stage(self, event: Stage) -> None:
        if event.state == "finished":
            task, began = self._stages.pop(event.stage, (None, event.at))
            if task is not None:
                self._progress.remove_task(task)
            self._line(wording.stage_end(event, event.at - began))
            return
        total = event.total or None
        if event.stage not in self._stages:
            task = self._progress.add_task(event.stage, total=total, values="")
            self._stages[event.stage] = task, event.at
            self._progress.start()
        task, began = self._stages[event.stage]
        values = event.note
        if event.total and event.done:
            left = (event.at - began) / event.done * (event.total - event.done)
            values = f"{event.done}/{event.total}  {wording.duration(left)} left"
        self._progress.update(task, total=total, completed=event.done, values=values)

    def _step(self, event: StepDone) -> None:
        self._pace.add(event)
        if self._steps is None:
            self._steps = self._progress.add_task("", total=event.total_steps, values="")
            self._progress.start()
        self._progress.update(
            self._steps,
            description=f"step {event.step}/{event.total_steps}",
            completed=event.step,
            values=f"{wording.step_values(event, self._pace)}  {self._pace.left(event)} left",
        )

    def _line(self, text: str, style: str = "") -> None:
        # Lines are for copying: they are never wrapped, and brackets in them are no markup.
        self._console.print(Text(text, style=style), soft_wrap=True)
