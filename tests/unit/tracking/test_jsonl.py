"""The log of events."""

import json
from pathlib import Path

from simpletuner.tracking.sinks.jsonl import JsonlSink
from tests.unit.tracking.runs import small_run, step


def test_every_event_is_one_json_object_a_line(tmp_path: Path) -> None:
    events = list(small_run(tmp_path))
    sink = JsonlSink(tmp_path / "out" / "events.jsonl")

    for event in events:
        sink.handle(event)
    sink.close()

    lines = (tmp_path / "out" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [event.as_dict() for event in events]


def test_a_line_is_on_disk_as_soon_as_it_is_handled(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    sink = JsonlSink(path)

    sink.handle(step(1))

    assert path.read_bytes().endswith(b"\n")


def test_a_second_start_appends(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for number in (1, 2):
        sink = JsonlSink(path)
        sink.handle(step(number))
        sink.close()

    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_half_line_of_a_killed_run_spoils_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "st')

    sink = JsonlSink(path)
    sink.handle(step(2))
    sink.close()

    whole, half, new = path.read_text().splitlines()
    assert json.loads(whole)["step"] == 1
    assert half == '{"event": "st'
    assert json.loads(new)["step"] == 2


def test_a_loss_that_is_no_number_stays_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    sink = JsonlSink(path)

    sink.handle(step(1, seconds=float("nan")))

    assert json.loads(path.read_text())["seconds"] is None
