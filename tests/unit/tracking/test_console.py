"""The live view."""

import re
from io import StringIO
from pathlib import Path

from rich.console import Console

from simpletuner.core.events import RunFailed, RunFinished, Stage, StageProgress
from simpletuner.tracking.sinks.console import ConsoleSink
from tests.unit.tracking.runs import small_run, step


def terminal(width: int = 100) -> Console:
    return Console(file=StringIO(), force_terminal=True, width=width, legacy_windows=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_a_run_leaves_its_lines_on_the_screen() -> None:
    console = terminal()
    sink = ConsoleSink(console)

    for event in small_run(Path("out")):
        sink.handle(event)
    sink.close()

    shown = text_of(console)
    for line in (
        "text embeddings: 128 in 2.5 s",
        "latents: 0.0 s (nothing to encode)",
        "model  sdxl [base]",
        "warning: one picture [a.png] was left out",
        "step 2: 1 validation image in out (1:25)",
        "step 3: checkpoint-3 saved in 0.5 s",
        "weights: here",
    ):
        assert line in shown


def test_the_progress_line_shows_step_loss_rate_pace_and_time_left() -> None:
    console = terminal()
    sink = ConsoleSink(console)

    sink.handle(step(12))
    sink.close()

    assert "step 12/60" in text_of(console)
    assert "loss 0.2500  lr 1.00e-04  0.50 s/step  24 s left" in text_of(console)


def test_a_stage_shows_how_much_is_done_and_the_time_left() -> None:
    console = terminal()
    sink = ConsoleSink(console)

    sink.handle(Stage(at=0, stage="latents", state="running", total=100))
    sink.handle(StageProgress(at=5, stage="latents", state="running", done=25, total=100))
    sink.close()

    assert "25/100  15 s left" in text_of(console)


def test_a_failed_run_gives_the_cursor_back() -> None:
    console = terminal()
    sink = ConsoleSink(console)

    sink.handle(step(1))
    sink.handle(RunFailed(message="loss is not finite", exit_code=7))

    assert isinstance(console.file, StringIO)
    codes = console.file.getvalue()
    assert codes.rindex("\x1b[?25h") > codes.rindex("\x1b[?25l")


def test_long_closing_lines_are_not_wrapped_so_that_they_can_be_copied() -> None:
    console = terminal(width=40)
    sink = ConsoleSink(console)
    line = (
        "pipe.load_lora_weights('/a/long/path/to/a/folder/with/pytorch_lora_weights.safetensors')"
    )

    sink.handle(RunFinished(step=1, weights=Path("w"), verified="", lines=[line]))

    assert line in text_of(console)
