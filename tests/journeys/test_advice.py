"""An error says what to do; whoever does it and nothing else sees the run go on."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.cache.caches import Caches
from simpletuner.core.errors import CacheError
from simpletuner.core.types import Batch, PlannedBatch
from simpletuner.models.family import Family
from simpletuner.training.prefetch import Prefetcher
from simpletuner.training.stepper import Outcome, Stepper
from tests.faults.forks import newest_step
from tests.runs import Run, fill_the_memory

Captured = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
GOES_ON = "resume_from_checkpoint=latest, the default, resumes from the last checkpoint"
CHANGED = "--on_data_change continue"


class Advised(Run):
    """A run with few adapters, no pictures and a checkpoint after every step."""

    def __init__(self, root: Path, model: Path) -> None:
        super().__init__(root, model)
        self.settings |= {
            "peft_lora_target_modules": ["to_q"],
            "validation_disable": True,
            "checkpoint_step_interval": 1,
            "checkpoints_total_limit": 0,
        }

    def resumed(self) -> str | None:
        """Where the last start went on."""
        found: str | None = self.events("run.started")[-1]["summary"].get("resumed")
        return found

    def steps(self) -> list[int]:
        return [event["step"] for event in self.events("step")]


def fail_in_step_three(monkeypatch: Patch) -> None:
    step = Stepper.step

    def full(self: Stepper, number: int, window: Any) -> Outcome:
        if number == 2:
            fill_the_memory()
        return step(self, number, window)

    monkeypatch.setattr(Stepper, "step", full)


def break_what_step_three_reads(monkeypatch: Patch) -> None:
    """From then on these pictures, by content, give latents that are not finite."""
    read, bad, count = Caches.batch, set(), itertools.count(1)

    def broken(self: Caches, planned: PlannedBatch) -> Batch:
        batch = read(self, planned)
        contents = {sample.id for sample in batch.samples}
        if next(count) == 3:
            bad.update(contents)
        if contents & bad:
            batch.latents.fill_(float("nan"))
        return batch

    monkeypatch.setattr(Caches, "batch", broken)


# --- a full memory -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "resolution", "changes_the_plan"),
    [
        ({"gradient_checkpointing": True, "mixed_precision": "bf16"}, 64, False),
        ({"train_batch_size": 1}, 64, True),
        ({}, 48, True),
    ],
    ids=["computed otherwise", "smaller batches", "smaller pictures"],
)
def test_less_memory_is_taken_as_advised_and_the_run_goes_on(
    tiny_sdxl: Path,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: Patch,
    settings: dict[str, Any],
    resolution: int,
    changes_the_plan: bool,
) -> None:
    run = Advised(tmp_path, tiny_sdxl)
    with monkeypatch.context() as patch:
        fail_in_step_three(patch)
        assert run.train() == 7
    message = capsys.readouterr().err
    assert "DefaultCPUAllocator: can't allocate memory" in message
    assert (
        "set gradient_checkpointing true and mixed_precision bf16; if that is not enough, lower"
        f" train_batch_size or resolution and start again with {CHANGED}; {GOES_ON}"
    ) in message
    run.dataset["resolution"] = resolution
    if changes_the_plan:
        assert run.train(**settings) == 3  # what the advice is for
        settings = {**settings, "on_data_change": "continue"}
    assert run.train(**settings) == 0
    assert run.resumed() == "checkpoint-2, 2 steps done"
    assert run.steps() == [1, 2, 3, 4]


def test_what_is_done_already_is_not_advised(
    tiny_sdxl: Path, tmp_path: Path, capsys: Captured, monkeypatch: Patch
) -> None:
    run = Advised(tmp_path, tiny_sdxl)
    fail_in_step_three(monkeypatch)
    run.settings |= {"mixed_precision": "bf16", "gradient_checkpointing": True}
    assert run.train(train_batch_size=1) == 7
    message = capsys.readouterr().err
    assert f"\n  lower resolution and start again with {CHANGED}; {GOES_ON}\n" in message


def test_a_run_that_starts_over_is_told_how_it_goes_on(
    tiny_sdxl: Path, tmp_path: Path, capsys: Captured, monkeypatch: Patch
) -> None:
    run = Advised(tmp_path, tiny_sdxl)
    with monkeypatch.context() as patch:
        fail_in_step_three(patch)
        assert run.train(resume_from_checkpoint="none") == 7
    message = capsys.readouterr().err
    assert GOES_ON in message
    assert "next start" not in message
    assert run.train(resume_from_checkpoint="latest", gradient_checkpointing=True) == 0
    assert run.resumed() == "checkpoint-2, 2 steps done"


@pytest.mark.parametrize(
    ("together", "full", "said", "less", "changes_the_plan"),
    [
        (
            2,
            lambda vae, pixels: len(pixels) > 1,
            r"2 pictures of \d+x\d+; step 2 of 4 is saved\n  lower vae_batch_size \(a dataset may"
            rf" have its own\) and start again; {GOES_ON}",
            {"vae_batch_size": 1},
            False,
        ),
        (
            1,
            lambda vae, pixels: not vae.use_tiling,
            r"1 picture of \d+x\d+; step 2 of 4 is saved\n  set vae_enable_tiling true or lower the"
            rf" resolution and start again with {CHANGED}; {GOES_ON}",
            {"vae_enable_tiling": True},
            True,
        ),
    ],
    ids=["batch", "picture"],
)
def test_pictures_that_fill_the_memory_in_the_loop_cost_no_step(
    tiny_sdxl: Path,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: Patch,
    together: int,
    full: Callable[[Any, Any], bool],
    said: str,
    less: dict[str, Any],
    changes_the_plan: bool,
) -> None:
    run, encode, count = Advised(tmp_path, tiny_sdxl), Family.encode_pixels, itertools.count()
    run.settings |= {"vae_cache_disable": True, "checkpoint_step_interval": 0}
    two_steps = 2 * run.settings["train_batch_size"] // together

    def full_after_two_steps(self: Family, vae: Any, pixels: Any, noise: Any) -> Any:
        if next(count) >= two_steps and full(vae, pixels):
            fill_the_memory()
        return encode(self, vae, pixels, noise)

    monkeypatch.setattr(Family, "encode_pixels", full_after_two_steps)
    assert run.train(vae_batch_size=together) == 4
    assert re.search(f"the memory is full while encoding {said}\n", capsys.readouterr().err)
    if changes_the_plan:
        assert run.train(**less) == 3  # what the advice is for
        less = {**less, "on_data_change": "continue"}
    assert run.train(**less) == 0
    assert run.resumed() == "checkpoint-2, 2 steps done"
    assert run.steps() == [1, 2, 3, 4]


# --- pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["removed", "repaired"])
def test_pictures_that_break_the_loss_are_mended_as_advised_and_the_run_goes_on(
    tiny_sdxl: Path, tmp_path: Path, capsys: Captured, monkeypatch: Patch, way: str
) -> None:
    run = Advised(tmp_path, tiny_sdxl)
    break_what_step_three_reads(monkeypatch)
    assert run.train() == 7
    message = capsys.readouterr().err
    assert f"repair or remove these pictures and start again with {CHANGED}; {GOES_ON}" in message
    assert newest_step(run.out) == 2  # nothing is saved on top of a loss that is not finite
    named = re.findall(r"pictures/(\w+\.png)", message)
    assert len(named) == 2
    for name in named:
        (run.pictures / name).unlink()
        if way == "repaired":
            Image.new("RGB", (80, 80), (len(name), 0, 0)).save(run.pictures / name)
    assert run.train() == 3
    assert CHANGED in capsys.readouterr().err
    assert run.train(on_data_change="continue") == 0
    assert run.resumed() == "checkpoint-2, 2 steps done"
    assert run.steps() == [1, 2, 3, 4]


def test_a_picture_that_cannot_be_decoded_in_the_loop_costs_no_step(
    tiny_sdxl: Path, tmp_path: Path, capsys: Captured
) -> None:
    for number in range(8):
        run = Advised(tmp_path / str(number), tiny_sdxl)
        run.settings |= {"vae_cache_disable": True, "checkpoint_step_interval": 0}
        picture = run.pictures / f"a_picture_number_{number}.png"
        picture.write_bytes(picture.read_bytes()[:-60])
        assert run.train() == 3
        message = capsys.readouterr().err
        if done := len(run.steps()):
            break
        assert "is saved" not in message  # it is met in the first step
        assert not list(run.out.glob("checkpoint-*"))
    assert f"pictures: {picture.name} cannot be decoded" in message
    assert f"; step {done} of 4 is saved" in message
    assert f"start again with {CHANGED}, which leaves it out" in message
    assert f"at once; {GOES_ON}" in message
    assert run.train(on_data_change="continue") == 0
    assert run.resumed() == f"checkpoint-{done}, {done} steps done"
    assert run.steps() == [1, 2, 3, 4]


def test_a_loss_that_is_not_finite_is_not_saved_by_an_error_after_it(
    tiny_sdxl: Path, tmp_path: Path, capsys: Captured, monkeypatch: Patch
) -> None:
    run, window = Advised(tmp_path, tiny_sdxl), Prefetcher.window
    break_what_step_three_reads(monkeypatch)

    def unreadable(self: Prefetcher, step: int) -> Any:
        if step == 3:
            raise CacheError("the pack is gone")
        return window(self, step)

    monkeypatch.setattr(Prefetcher, "window", unreadable)
    assert run.train(checkpoint_step_interval=0) == 7
    message = capsys.readouterr().err
    assert "the loss of step 3 is not finite" in message
    assert "is saved" not in message
    assert not list(run.out.glob("checkpoint-*"))
