"""Checkpoints on their own: which are kept, which are used, what comes back."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from simpletuner.adapters.weights import Weights
from simpletuner.core.errors import DataError, TrainingError
from simpletuner.core.events import Bus, CheckpointSaved, Event, Notice
from simpletuner.core.files import RunFolder, read_json, sha256_file, write_json
from simpletuner.optim.build import optimizer_tensors
from simpletuner.training.checkpoint import Checkpointer, DamagedCheckpoint, verify
from simpletuner.training.state import TrainState
from simpletuner.training.stepper import Stepper
from tests.unit.training.builds import build_stepper, make_batch, window_of

DATA = {"dataset a: pictures": "8, 0f", "dataset a: captions": "1", "seed": "7"}
MODEL = {"base model": "ab", "lora_alpha": "6", "optimizer": "adamw_bf16"}
SETTINGS = {"learning_rate": "0.001", "lr_scheduler": "constant"}


class Told:
    """A sink that keeps what it hears."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def handle(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        """Hold nothing."""


@dataclass
class Place:
    """A run's weights, its state, and what saves them."""

    stepper: Stepper
    saver: Checkpointer
    told: Told

    @property
    def root(self) -> Path:
        return self.saver.folder.root

    @property
    def state(self) -> TrainState:
        return self.saver.state

    def train(self, steps: int) -> None:
        """Train and save after every step."""
        for _ in range(steps):
            self.stepper.step(self.state.step, window_of(make_batch(1, 2)))
            self.state.step += 1
            self.state.samples_seen += 2
            self.saver.save(self.state)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies of everything that a checkpoint holds."""
        weights = self.saver.weights
        found = {
            **weights.trainable.parameters(),
            **optimizer_tensors(weights.optimizer, weights.trainable.groups()),
        }
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    def resume(self, wanted: str = "latest", on_data_change: str = "refuse") -> Path | None:
        return self.saver.resume(wanted, on_data_change=on_data_change)

    def notices(self) -> str:
        self.saver.bus.close()
        return "\n".join(event.text for event in self.told.events if isinstance(event, Notice))

    def names(self) -> set[str]:
        return {path.name for path in self.root.iterdir()}


def opened(model: Path, root: Path, limit: int = 0) -> Place:
    """A run as it is before its first step; the same one at every call."""
    root.mkdir(exist_ok=True)
    stepper, told = build_stepper(model, adapter={"peft_lora_target_modules": ["to_q"]}), Told()
    weights: Weights = stepper.weights
    state = TrainState(DATA, MODEL, SETTINGS, torch.get_num_threads(), "cpu")
    bus = Bus([told])
    return Place(
        stepper,
        Checkpointer(RunFolder(root), state, weights, limit, lambda s: {"steps": str(s.step)}, bus),
        told,
    )


@pytest.fixture(scope="module")
def saved(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoint-1 to checkpoint-4; read it only."""
    root = tmp_path_factory.mktemp("checkpoints") / "out"
    opened(tiny_sdxl, root).train(4)
    return root


@pytest.fixture
def place(tiny_sdxl: Path, tmp_path: Path, saved: Path) -> Place:
    """A start in a copy of that folder."""
    shutil.copytree(saved, tmp_path / "out")
    return opened(tiny_sdxl, tmp_path / "out")


@pytest.mark.parametrize(("limit", "kept"), [(0, (1, 2, 3, 4)), (1, (4,)), (3, (2, 3, 4))])
def test_the_newest_are_kept_and_the_oldest_removed(
    tiny_sdxl: Path, tmp_path: Path, limit: int, kept: tuple[int, ...]
) -> None:
    place = opened(tiny_sdxl, tmp_path / "out", limit)
    place.train(4)
    assert place.names() == {f"checkpoint-{step}" for step in kept}
    for step in kept:
        verify(place.root / f"checkpoint-{step}")
    place.saver.bus.close()
    told = [event for event in place.told.events if isinstance(event, CheckpointSaved)]
    assert [event.folder.name for event in told] == [f"checkpoint-{s}" for s in (1, 2, 3, 4)]


def test_rotation_counts_steps_as_numbers_and_leaves_other_things_alone(place: Place) -> None:
    (place.root / "checkpoint-final").mkdir()
    (place.root / "previous-1").mkdir()
    place.state.step = 10
    replace(place.saver, limit=2).save(place.state)
    assert place.names() == {"checkpoint-4", "checkpoint-10", "checkpoint-final", "previous-1"}


def test_weights_optimizer_and_state_come_back_exactly(tiny_sdxl: Path, place: Place) -> None:
    fresh = place.tensors()
    assert place.resume() == place.root / "checkpoint-4"
    back = place.tensors()
    assert (place.state.step, place.state.samples_seen) == (4, 8)
    assert place.names() == {f"checkpoint-{step}" for step in (1, 2, 3, 4)}

    straight = opened(tiny_sdxl, place.root.parent / "straight")
    straight.train(4)
    expected = straight.tensors()
    assert back.keys() == expected.keys() > fresh.keys()
    assert all(torch.equal(back[name], expected[name]) for name in expected)
    assert any(not torch.equal(back[name], fresh[name]) for name in fresh)
    for each in (place, straight):
        each.train(1)
    for file in (place.root / "checkpoint-5").iterdir():
        assert file.read_bytes() == (straight.root / "checkpoint-5" / file.name).read_bytes()


@pytest.mark.parametrize("way", ["name", "path"])
def test_an_earlier_one_moves_the_later_ones_aside(place: Place, way: str) -> None:
    wanted = "checkpoint-2" if way == "name" else str(place.root / "checkpoint-2")
    assert place.resume(wanted) == place.root / "checkpoint-2"
    assert place.state.step == 2
    assert place.names() == {"checkpoint-1", "checkpoint-2", "previous-1"}
    for name in ("checkpoint-3", "checkpoint-4"):
        verify(place.root / "previous-1" / name)
    assert "checkpoint-3, checkpoint-4 of an earlier run moved to previous-1/" in place.notices()


def test_none_moves_everything_aside_each_time_to_a_new_place(place: Place) -> None:
    fresh = place.tensors()
    assert place.resume("none") is None
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in place.tensors().items())
    assert (place.state.step, place.names()) == (0, {"previous-1"})
    assert len(list((place.root / "previous-1").iterdir())) == 4
    assert place.resume("none") is None
    assert place.names() == {"previous-1"}  # nothing to move, no empty folder
    place.train(1)
    assert place.resume("none") is None
    assert place.names() == {"previous-1", "previous-2"}
    assert [path.name for path in (place.root / "previous-2").iterdir()] == ["checkpoint-1"]


def test_a_first_start_begins_anew_whatever_is_asked(tiny_sdxl: Path, tmp_path: Path) -> None:
    place = opened(tiny_sdxl, tmp_path / "out")
    assert place.resume("latest") is None
    assert place.resume("none") is None
    assert place.names() == set()


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(place: Place) -> None:
    with pytest.raises(TrainingError, match="checkpoint-9 is neither a folder nor") as error:
        place.resume("checkpoint-9")
    assert error.value.fix == "there are: checkpoint-4, checkpoint-3, checkpoint-2, checkpoint-1"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("lora_alpha", "9", r"lora_alpha changed \(was 6, now 9\)"),
        ("optimizer", "torch-adamw", r"optimizer changed \(was adamw_bf16, now torch-adamw\)"),
        ("base model", "cd", "base model changed$"),
    ],
)
def test_another_model_or_optimizer_is_refused_whatever_is_said_of_data(
    place: Place, name: str, value: str, told: str
) -> None:
    saver = replace(place.saver, state=replace(place.state, model={**MODEL, name: value}))
    before = place.tensors()
    with pytest.raises(TrainingError) as error:
        saver.resume("checkpoint-2", on_data_change="continue")
    assert re.search(f"cannot go on from the checkpoint: {told}", error.value.message)
    assert len(place.names()) == 4  # nothing was moved
    assert all(torch.equal(tensor, before[name]) for name, tensor in place.tensors().items())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dataset a: captions": "2"}, "on other data: dataset a: captions changed"),
        ({"dataset b: captions": "1"}, "on other data: dataset b is new"),
        ({"seed": "8"}, "with other settings: seed changed (was 7, now 8)"),
    ],
)
def test_other_data_is_refused_by_name_unless_told_to_go_on(
    place: Place, change: dict[str, str], told: str
) -> None:
    state = replace(place.state, data={**DATA, **change})
    saver = replace(place.saver, state=state)
    with pytest.raises(DataError) as error:
        saver.resume("checkpoint-2", on_data_change="refuse")
    assert error.value.message == f"the checkpoint was trained {told}"
    assert (state.step, len(place.names())) == (0, 4)
    assert saver.resume("checkpoint-2", on_data_change="continue")
    assert state.step == 2
    _, _, what = told.partition(": ")
    assert f"{what} since the checkpoint; going on with what is there now" in place.notices()


def test_a_setting_that_may_change_is_told_and_gone_on_with(place: Place) -> None:
    place.state.settings = {**SETTINGS, "learning_rate": "0.01"}
    assert place.resume()
    assert place.notices() == "changed since the checkpoint: learning_rate: was 0.001, now 0.01"


def test_nothing_is_told_where_nothing_changed(place: Place) -> None:
    assert place.resume()
    assert place.notices() == ""


def test_other_targets_are_refused_by_name(tiny_sdxl: Path, saved: Path) -> None:
    stepper = build_stepper(tiny_sdxl, adapter={"peft_lora_target_modules": ["to_k"]})
    state = TrainState(DATA, MODEL, SETTINGS, torch.get_num_threads(), "cpu")
    saver = Checkpointer(RunFolder(saved), state, stepper.weights, 0, lambda _: {}, Bus())
    with pytest.raises(TrainingError, match=r"holds other weights .* 64 differ") as error:
        saver.resume("checkpoint-4", on_data_change="refuse")
    assert "set what is trained (lora_rank, peft_lora_target_modules …) back" in str(error.value)


def test_another_machine_is_told_once_by_what_differs(place: Place) -> None:
    place.state.threads += 1
    place.state.device = "cuda"
    place.state.versions = {**place.state.versions, "torch": "9.9"}
    assert place.resume()
    (notice,) = place.notices().splitlines()
    for told in ("CPU threads: was ", "device: was cpu, now cuda; torch: was ", ", now 9.9: "):
        assert told in notice
    assert notice.endswith("results may differ in the last digits")
    assert [e.level for e in place.told.events if isinstance(e, Notice)] == ["warning"]


def test_a_kill_before_the_last_rename_loses_nothing(place: Place) -> None:
    (place.root / "checkpoint-4").rename(place.root / "checkpoint-4.partial")
    shutil.copytree(place.root / "checkpoint-3", place.root / "checkpoint-5.partial")
    (place.root / "checkpoint-5.partial" / "manifest.json").unlink()
    (place.root / "checkpoint-1").rename(place.root / "checkpoint-1.removing")
    assert place.resume() == place.root / "checkpoint-4"
    assert place.names() == {"checkpoint-2", "checkpoint-3", "checkpoint-4"}


@pytest.mark.parametrize("killed", ["at the rename", "after the rename"])
@pytest.mark.parametrize(("limit", "kept"), [(0, {1, 2, 3, 4}), (1, {4}), (3, {2, 3, 4})])
def test_the_limit_holds_again_after_a_kill_at_the_rename(
    place: Place, limit: int, kept: set[int], killed: str
) -> None:
    if killed == "at the rename":
        (place.root / "checkpoint-4").rename(place.root / "checkpoint-4.partial")
    saver = replace(place.saver, limit=limit)
    assert saver.resume("latest", on_data_change="refuse") == place.root / "checkpoint-4"
    assert place.names() == {f"checkpoint-{step}" for step in kept}


def test_the_checkpoint_that_was_asked_for_outlives_a_recovered_one(place: Place) -> None:
    (place.root / "checkpoint-4").rename(place.root / "checkpoint-4.partial")
    saver = replace(place.saver, limit=1)
    assert saver.resume("checkpoint-2", on_data_change="refuse") == place.root / "checkpoint-2"
    assert place.names() == {"checkpoint-2", "previous-1"}
    verify(place.root / "previous-1" / "checkpoint-4")


def test_a_refused_start_removes_nothing(place: Place) -> None:
    state = replace(place.state, data={**DATA, "seed": "8"})
    with pytest.raises(DataError):
        replace(place.saver, limit=1, state=state).resume("latest", on_data_change="refuse")
    assert place.names() == {f"checkpoint-{step}" for step in (1, 2, 3, 4)}


@pytest.mark.parametrize("wanted", ["latest", "checkpoint-4"])
def test_checkpoints_of_an_older_format_are_refused_with_a_sentence(
    place: Place, wanted: str
) -> None:
    for step in (1, 2, 3, 4):
        folder = place.root / f"checkpoint-{step}"
        facts = read_json(folder / "state.json")
        del facts["settings"], facts["device"]
        write_json(folder / "state.json", facts)
        write_json(folder / "manifest.json", {**manifest_of(folder), "format": 1})
    words = "checkpoint-4 is of another version of simpletuner: its format is 1, this version reads"
    with pytest.raises(TrainingError, match=words) as error:
        place.resume(wanted)
    assert error.value.fix
    assert place.names() == {f"checkpoint-{step}" for step in (1, 2, 3, 4)}


def manifest_of(folder: Path) -> dict[str, object]:
    """A manifest that fits the files as they are now."""
    described: dict[str, object] = read_json(folder / "manifest.json")
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    return {**described, "files": files}


def test_verification_names_what_is_wrong(place: Place) -> None:
    folder = place.root / "checkpoint-4"
    manifest = folder / "manifest.json"
    described = read_json(manifest)

    def wrong(words: str) -> None:
        with pytest.raises(DamagedCheckpoint, match=words):
            verify(folder)

    for change, words in (
        ({**described, "format": 1}, "of another version of simpletuner"),
        ({"format": 3, "files": {}}, r"does not list optimizer\.safetensors"),
        ({"format": 3}, "manifest.json cannot be read"),
        ([], "manifest.json cannot be read"),
    ):
        write_json(manifest, change)
        wrong(words)
    write_json(manifest, described)
    verify(folder)
    data = (folder / "state.json").read_bytes()
    (folder / "state.json").write_bytes(data.replace(b"4", b"5", 1))
    wrong("state.json is damaged")
    (folder / "state.json").unlink()
    wrong("lacks state.json")
    manifest.unlink()
    wrong("has no manifest.json")
