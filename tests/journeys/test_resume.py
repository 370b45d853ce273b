"""A run that is cut goes on to the bit: 12 steps are 5, a `kill -9`, and 7."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from simpletuner.optim.optimizers import OPTIMIZERS
from simpletuner.optim.schedules import SCHEDULES
from tests.faults.forks import Forks
from tests.faults.small import FAMILIES
from tests.runs import Run, make_pictures

COVER: tuple[tuple[str, str, int, str], ...] = (
    ("adamw_bf16", "cosine", 1, "no"),
    ("torch-adamw", "linear", 3, "no"),
    ("optimi-adamw", "constant_with_warmup", 1, "bf16"),
    ("optimi-lion", "polynomial", 3, "no"),
    ("adamw_bf16", "constant", 3, "bf16"),
    ("torch-adamw", "sine", 1, "no"),
    ("adamw_bf16", "cosine_with_restarts", 1, "no"),
    ("optimi-lion", "rex", 3, "no"),
)
"""Every schedule, both accumulations, both precisions, and the optimizers that differ most; each
optimizer is resumed bit for bit in tests/contracts, those with a mind of their own in whole runs in
tests/journeys/test_optimizers.py."""

TOLD = ("step", "epoch", "loss", "lr", "grad_norm", "samples", "total_steps")


class Bench:
    """Pictures, a tiny model and caches that are there already, for runs of one family."""

    def __init__(self, forks: Forks, root: Path, family: str, model: Path) -> None:
        self.forks, self.root, self.family, self.model = forks, root, family, model
        self.pictures = make_pictures(root / "pictures")
        forks.warm(self.run("warm"), max_train_steps=1)
        forks.warm(self.run("warm-bf16"), max_train_steps=1, mixed_precision="bf16")

    def run(self, name: str) -> Run:
        """A run that has not begun."""
        run = Run(self.root / name, self.model, self.pictures)
        run.settings |= {
            "model_family": self.family,
            "cache_dir": str(self.root / "cache"),
            "peft_lora_target_modules": ["to_q"],
            "lora_dropout": 0.1,
            "lr_scheduler": "constant",
            "checkpoint_step_interval": 5,
            "validation_step_interval": 7,
            "validation_num_inference_steps": 1,
        }
        return run


@pytest.fixture(scope="module", params=FAMILIES, ids=[name for name, _ in FAMILIES])
def bench(
    request: pytest.FixtureRequest, forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> Bench:
    family, model = request.param
    root = tmp_path_factory.mktemp(f"resume-{family}")
    return Bench(forks, root, family, request.getfixturevalue(model))


def steps(run: Run) -> list[Mapping[str, Any]]:
    """What was told of each step, the clock aside."""
    return [{name: event[name] for name in TOLD} for event in run.events("step")]


def windows(file: Path) -> list[tuple[int, Any]]:
    """(step, samples) as the loop was given them, 0-based."""
    read = [json.loads(line) for line in file.read_text().splitlines()]
    return [(each["step"], each["samples"]) for each in read]


def files(run: Run, step: int) -> dict[str, bytes]:
    """The result, and the files of a checkpoint, whole."""
    folder = run.out / f"checkpoint-{step}"
    found = {f"{folder.name}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    return found | {"weights": (run.out / "pytorch_lora_weights.safetensors").read_bytes()}


def test_every_schedule_that_is_built_is_resumed_below() -> None:
    assert {row[0] for row in COVER} <= {n for n, row in OPTIMIZERS.items() if not row.pending}
    assert {row[1] for row in COVER} == {n for n, row in SCHEDULES.items() if not row.pending}
    assert {row[2] for row in COVER} == {1, 3}


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "schedule", "accumulation", "precision"), COVER)
def test_twelve_steps_are_five_a_kill_and_seven_to_the_bit(
    bench: Bench, optimizer: str, schedule: str, accumulation: int, precision: str
) -> None:
    name = f"{optimizer}-{schedule}"
    straight, cut = bench.run(f"{name}-straight"), bench.run(f"{name}-cut")
    orders = [bench.root / f"{name}-{run}.windows" for run in ("straight", "cut", "resumed")]
    settings = {
        "max_train_steps": 12,
        "optimizer": optimizer,
        "lr_scheduler": schedule,
        "lr_warmup_steps": 0 if schedule == "constant" else 2,
        "gradient_accumulation_steps": accumulation,
        "mixed_precision": precision,
    }
    # ten steps, of which the last five are not in a checkpoint yet
    kill = {"act": "kill", "what": "mkdir", "only": "checkpoint-10.partial", "at": 1}
    killed = bench.forks.start(cut, kill, windows=orders[1], **settings)
    whole = bench.forks.train(straight, windows=orders[0], **settings)
    assert whole.code == 0, whole.output
    assert killed.wait().code == -signal.SIGKILL
    before = len(steps(cut))
    resumed = bench.forks.train(cut, windows=orders[2], **settings)
    assert resumed.code == 0, resumed.output
    assert "checkpoint-5, 5 steps done" in resumed.output

    expected, found = steps(straight), steps(cut)
    assert [each["step"] for each in expected] == list(range(1, 13))
    assert found[:before] == expected[:before]
    assert found[before:] == expected[5:]
    assert len({each["epoch"] for each in expected}) > 2
    order = windows(orders[0])
    assert [step for step, _ in order] == list(range(12))
    assert windows(orders[1]) == order[:10]
    assert windows(orders[2]) == order[5:]
    assert files(cut, 12) == files(straight, 12)
    for picture in (straight.out / "validation_images").glob("*.png"):
        assert (cut.out / "validation_images" / picture.name).read_bytes() == picture.read_bytes()


def test_more_steps_go_on_by_exactly_the_difference_and_a_finished_run_says_so(
    bench: Bench,
) -> None:
    straight, longer = bench.run("longer-straight"), bench.run("longer")
    assert bench.forks.train(straight, max_train_steps=8).code == 0
    assert bench.forks.train(longer, max_train_steps=5).code == 0
    done = files(longer, 5)
    again = bench.forks.train(longer, max_train_steps=5)
    assert again.code == 0
    assert "this run is finished: 5 of 5 steps are done" in again.output
    assert files(longer, 5) == done
    assert bench.forks.train(longer, max_train_steps=8).code == 0
    told = [{**each, "total_steps": 8} for each in steps(longer)]
    assert told == steps(straight)
    assert files(longer, 8) == files(straight, 8)


def test_what_changed_since_the_checkpoint_is_refused_by_name_unless_told_to_go_on(
    bench: Bench, tmp_path: Path
) -> None:
    run = bench.run("changed")
    run.dataset["instance_data_dir"] = str(make_pictures(tmp_path / "pictures"))
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert bench.forks.train(run, max_train_steps=2).code == 0
    for change, named in (
        ({"train_batch_size": 1}, "train_batch_size"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"seed": 7}, "seed"),
    ):
        ended = bench.forks.train(run, max_train_steps=4, **change)
        assert ended.code == 3, ended.output
        assert f"{named} changed" in ended.output
    pictures[0].write_bytes(pictures[1].read_bytes())  # another picture under the same name
    ended = bench.forks.train(run, max_train_steps=4)
    assert ended.code == 3, ended.output
    assert "the checkpoint was trained on other data: " in ended.output
    assert "pictures" in ended.output
    assert "--on_data_change continue" in ended.output
    ended = bench.forks.train(run, max_train_steps=4, on_data_change="continue")
    assert ended.code == 0, ended.output
    assert "going on with what is there now" in ended.output
    assert [each["step"] for each in steps(run)] == [1, 2, 3, 4]
