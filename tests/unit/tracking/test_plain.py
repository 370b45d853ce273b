"""The plain log."""

from io import StringIO
from pathlib import Path

from simpletuner.tracking.sinks.plain import PlainSink
from tests.unit.tracking.runs import small_run, step


def test_a_run_reads_as_one_plain_line_for_each_thing_that_happened() -> None:
    out = StringIO()
    sink = PlainSink(out)

    for event in small_run(Path("out")):
        sink.handle(event)
    sink.close()

    assert out.getvalue().splitlines() == [
        "text embeddings (128) …",
        "text embeddings: 128 in 2.5 s",
        "latents …",
        "latents: 0.0 s (nothing to encode)",
        "model: sdxl [base]",
        "warning: one picture [a.png] was left out",
        "step 1/3  loss 0.2500  lr 1.00e-04  0.50 s/step  1.0 s left",
        "step 2: 1 validation image in out (1:25)",
        "step 3/3  loss 0.2500  lr 1.00e-04  0.50 s/step  0.0 s left",
        "step 3: checkpoint-3 saved in 0.5 s",
        "weights: here",
    ]


def test_steps_get_a_line_at_the_interval_and_at_both_ends() -> None:
    out = StringIO()
    sink = PlainSink(out, step_interval_seconds=10)

    for number in range(1, 61):
        sink.handle(step(number, at=0.5 * number))

    shown = [line.split("/")[0] for line in out.getvalue().splitlines()]
    assert shown == ["step 1", "step 21", "step 41", "step 60"]


def test_the_time_left_counts_steps_only_and_not_what_lay_between_them() -> None:
    out = StringIO()
    sink = PlainSink(out, step_interval_seconds=0)

    sink.handle(step(10, at=5, seconds=0.5))
    sink.handle(step(11, at=600, seconds=0.5))  # ten minutes of validation in between

    assert out.getvalue().splitlines()[-1].endswith("24 s left")


def test_no_control_code_is_written() -> None:
    out = StringIO()
    sink = PlainSink(out)

    for event in small_run(Path("out")):
        sink.handle(event)

    assert all(letter.isprintable() for letter in out.getvalue().replace("\n", ""))
