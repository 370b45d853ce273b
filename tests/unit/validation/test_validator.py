"""What is told and kept of validations that fail, and of pictures from before."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from simpletuner.validation.sampler import Sampler
from tests.runs import Run

BOTH = {"max_train_steps": 1, "disable_benchmark": False}


def before_each_picture(monkeypatch: pytest.MonkeyPatch, do: Callable[[int], None]) -> None:
    """Call `do` with the picture's number, counted from 1."""
    real, begun = Sampler.picture, count(1)

    def picture(*arguments: Any) -> Image.Image:
        do(next(begun))
        return real(*arguments)

    monkeypatch.setattr(Sampler, "picture", picture)


def told(run: Run) -> list[list[str]]:
    """The names of the pictures of each event."""
    events = run.events("validation.images")
    return [[Path(path).name for path in event["images"]] for event in events]


def notices(run: Run) -> str:
    return "\n".join(event["text"] for event in run.events("notice"))


def test_pictures_made_before_a_failure_are_told_and_the_next_start_makes_the_rest(
    tmp_path: Path, tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, trained = Run(tmp_path, tiny_sdxl), "step_1_validation_0_64x96.png"

    def full(number: int) -> None:
        if number == 2:  # the base's
            raise torch.OutOfMemoryError("the memory is full")

    with monkeypatch.context() as patch:
        before_each_picture(patch, full)
        assert run.train(**BOTH) == 0
    assert "validation after step 1 failed: the memory is full" in notices(run)
    assert told(run) == [[trained]]
    assert not (run.out / "before_after.png").exists()

    assert run.train(**BOTH) == 0
    everything = [trained, "validation_0_64x96.png", "before_after.png"]
    assert told(run) == [[trained], everything]

    assert run.train(**BOTH) == 0  # now there is nothing to do
    assert told(run) == [[trained], everything]


def test_the_sheet_of_an_earlier_run_goes_at_the_first_validation(
    tmp_path: Path, tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, there = Run(tmp_path, tiny_sdxl), []
    sheet = run.out / "before_after.png"
    assert run.train(**BOTH) == 0
    assert sheet.exists()

    before_each_picture(monkeypatch, lambda _: there.append(sheet.exists()))
    settings = BOTH | {"max_train_steps": 2, "validation_step_interval": 1}
    assert run.train(**settings, resume_from_checkpoint="none") == 0

    assert there == [False] * 3
    assert told(run)[-1][-1] == "before_after.png"


def test_the_sheet_of_later_steps_goes_where_a_run_goes_back(
    tmp_path: Path, tiny_sdxl: Path
) -> None:
    run = Run(tmp_path, tiny_sdxl)
    sheet = run.out / "before_after.png"
    settings = BOTH | {"checkpoint_step_interval": 1}
    assert run.train(**settings | {"max_train_steps": 2}) == 0
    later = sheet.read_bytes()

    assert run.train(**settings, resume_from_checkpoint="checkpoint-1") == 0

    assert sheet.read_bytes() != later
    assert "step_1_validation_0_64x96.png" in told(run)[-1]


@pytest.mark.parametrize("disable_benchmark", [False, True])
def test_a_finished_run_shows_another_prompt_when_asked(
    tmp_path: Path, tiny_sdxl: Path, disable_benchmark: bool
) -> None:
    run = Run(tmp_path, tiny_sdxl)
    settings = BOTH | {"disable_benchmark": disable_benchmark}
    assert run.train(**settings) == 0
    assert run.train(**settings) == 0
    assert len(told(run)) == 1

    assert run.train(**settings, validation_prompt="another") == 0

    assert len(told(run)) == 2


def test_a_copied_run_shows_what_it_showed(tmp_path: Path, tiny_sdxl: Path) -> None:
    run = Run(tmp_path, tiny_sdxl)
    assert run.train(**BOTH) == 0
    for path in run.out.rglob("*"):
        os.utime(path, (1_700_000_000, 1_700_000_000))

    assert run.train(**BOTH) == 0

    assert len(told(run)) == 1
