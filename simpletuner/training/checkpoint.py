"""Checkpoints: complete or absent, verified before they are used, safetensors and JSON only.

checkpoint-N/
  pytorch_lora_weights.safetensors   what the user loads elsewhere
  trainable.safetensors              the same weights under their names, exactly as they train
  optimizer.safetensors              the optimizer's tensors by parameter name
  state.json                         step, epoch, samples, plan, versions
  manifest.json                      size and SHA-256 of each file above; written last
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simpletuner.adapters.export import read_tensors
from simpletuner.core.errors import DataError, SimpleTunerError, TrainingError
from simpletuner.core.events import Bus, CheckpointSaved
from simpletuner.core.files import (
    RunFolder,
    fsync_folder,
    read_json,
    remove_folder,
    sha256_file,
    write_json,
    write_through,
)
from simpletuner.optim.build import load_optimizer_tensors, optimizer_tensors

if TYPE_CHECKING:
    from simpletuner.adapters.weights import Weights
    from simpletuner.training.state import TrainState

_NAME = re.compile(r"checkpoint-(\d+)")


class DamagedCheckpoint(SimpleTunerError):
    """A checkpoint's files are not those of its manifest."""


def found_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint in `root`, newest first, without unfinished ones."""
    if not root.is_dir():
        return []
    matches = ((_NAME.fullmatch(p.name), p) for p in root.iterdir() if p.is_dir())
    return sorted(((int(m[1]), p) for m, p in matches if m), reverse=True)


def verify(folder: Path) -> None:
    """Compare a checkpoint with its manifest.

    Raises:
        DamagedCheckpoint: Something is missing, short or changed; the message names it.
    """
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise DamagedCheckpoint(f"{folder.name} has no manifest.json")
    try:
        files: Mapping[str, Any] = read_json(manifest)["files"]
    except (ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"{folder.name}/manifest.json cannot be read") from error
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{folder.name} lacks {name}")
        if path.stat().st_size != facts["size"] or sha256_file(path) != facts["sha256"]:
            raise DamagedCheckpoint(f"{folder.name}/{name} is damaged")


@dataclass(frozen=True)
class Checkpointer:
    """Saves and restores a run.

    Args:
        limit: Complete checkpoints kept; 0 keeps all.
        metadata: The header of the user's files, as a function of the state.
    """

    folder: RunFolder
    state: TrainState
    weights: Weights
    limit: int
    metadata: Any
    bus: Bus

    def save(self, state: TrainState) -> Path:
        """Write ``checkpoint-N`` whole, then remove the oldest over the limit."""
        began = time.perf_counter()
        final = self.folder.checkpoint(state.step)
        partial = final.with_name(f"{final.name}.partial")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        self._write(partial, state)
        if final.exists():  # the same step again, after a resume that changed nothing else
            remove_folder(final)
        partial.rename(final)
        fsync_folder(final.parent)
        self._rotate(final)
        seconds = time.perf_counter() - began
        self.bus.emit(CheckpointSaved(step=state.step, folder=final, seconds=seconds))
        return final

    def _write(self, folder: Path, state: TrainState) -> None:
        from safetensors.torch import save_file

        trainable = self.weights.trainable
        with self.weights.at("eval"):
            trainable.export(folder, self.metadata(state))
        with self.weights.at("raw"):
            tensors = {
                "trainable": trainable.parameters(),
                "optimizer": optimizer_tensors(self.weights.optimizer, trainable.groups()),
            }
            for name, found in tensors.items():
                ready = {k: v.detach().cpu().contiguous() for k, v in found.items()}
                write_through(
                    folder / f"{name}.safetensors", lambda path, ready=ready: save_file(ready, path)
                )
        write_json(folder / "state.json", state.as_dict())
        files = {
            path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(folder.iterdir())
        }
        write_json(folder / "manifest.json", {"format": 1, "files": files})

    def _rotate(self, newest: Path) -> None:
        kept = [path for _, path in found_checkpoints(self.folder.root)]
        for path in kept[self.limit or len(kept) :]:
            if path != newest:
                remove_folder(path)
        for stale in self.folder.root.glob("checkpoint-*.removing"):
            shutil.rmtree(stale, ignore_errors=True)

    # --- resuming ------------------------------------------------------------------------------

    def resume(self, wanted: str, *, on_data_change: str) -> Path | None:
        """Restore weights, optimizer and state in place.

        Args:
            wanted: ``latest``, ``none``, a checkpoint's name in the output folder, or its path.
            on_data_change: ``refuse`` or ``continue``.

        Returns:
            The checkpoint used, or None for a fresh start.

        Raises:
            TrainingError: The one named does not exist or is damaged, or none verifies.
            DataError: The data is not what the checkpoint was trained on.
        """
        folder = self._choose(wanted)
        if folder is None:
            return None
        facts = read_json(folder / "state.json")
        self._check_plan(facts, on_data_change)
        self._check_numbers(facts)
        self._load_trainable(folder)
        load_optimizer_tensors(
            self.weights.optimizer,
            self.weights.trainable.groups(),
            read_tensors(folder / "optimizer.safetensors"),
        )
        self.state.step = facts["step"]
        self.state.epoch = facts["epoch"]
        self.state.samples_seen = facts["samples_seen"]
        return folder

    def _choose(self, wanted: str) -> Path | None:
        if wanted == "none":
            return None
        if wanted != "latest":
            folder = Path(wanted).expanduser()
            if not folder.is_dir():
                folder = self.folder.root / wanted
            if not folder.is_dir():
                raise TrainingError(
                    f"resume_from_checkpoint: {wanted} is neither a folder nor a checkpoint in"
                    f" {self.folder.root}",
                    fix=f"there are: {self._names()}",
                )
            verify(folder)
            return folder
        damaged = []
        for _, folder in found_checkpoints(self.folder.root):
            try:
                verify(folder)
            except DamagedCheckpoint as error:
                damaged.append(error.message)
                self.bus.notice(f"{error.message}; trying the one before", "warning")
                continue
            return folder
        if damaged:
            raise TrainingError(
                f"no checkpoint can be resumed: {'; '.join(damaged)}",
                fix="resume_from_checkpoint=none starts over; the damaged folders are left as is",
            )
        return None

    def _names(self) -> str:
        return ", ".join(path.name for _, path in found_checkpoints(self.folder.root)) or "none"

    def _check_plan(self, facts: Mapping[str, Any], on_data_change: str) -> None:
        before, now = dict(facts["plan"]), dict(self.state.plan)
        if facts["seed"] != self.state.seed:
            before["seed"], now["seed"] = str(facts["seed"]), str(self.state.seed)
        changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        if not changed:
            return
        what = ", ".join(changed)
        if on_data_change != "continue":
            raise DataError(
                f"the checkpoint was trained on other data: {what} changed",
                fix="undo the change, or go on with the new data: --on_data_change continue",
            )
        self.bus.notice(f"{what} changed since the checkpoint; going on with what is there now")

    def _check_numbers(self, facts: Mapping[str, Any]) -> None:
        if facts["threads"] != self.state.threads:
            self.bus.notice(
                f"the checkpoint was trained with {facts['threads']} CPU threads, this run has"
                f" {self.state.threads}: results can differ in the last digits",
                "warning",
            )

    def _load_trainable(self, folder: Path) -> None:
        saved: dict[str, Tensor] = read_tensors(folder / "trainable.safetensors")
        ours = self.weights.trainable.parameters()
        wrong = sorted(set(saved) ^ set(ours)) or [
            name for name in ours if saved[name].shape != ours[name].shape
        ]
        if wrong:
            raise TrainingError(
                f"{folder.name} holds other weights than these settings make:"
                f" {len(wrong)} differ, for example {wrong[0]}",
                fix="set lora_rank and peft_lora_target_modules back, or start over with"
                " resume_from_checkpoint=none and another output_dir",
            )
        with torch.no_grad():
            for name, parameter in ours.items():
                parameter.copy_(saved[name])
