"""Checkpoints: complete or absent, verified before they are used, safetensors and JSON only.

checkpoint-N/
  pytorch_lora_weights.safetensors   what the user loads elsewhere; a folder of a full model
  unet_weights.safetensors           with trainable_models beside a LoRA: what trained whole
  trainable.safetensors              the same weights under their names, exactly as they train
  optimizer.safetensors              the optimizer's tensors by parameter name
  ema.safetensors                    with use_ema: the average
  scaler.safetensors                 with mixed_precision fp16: what the loss is scaled by
  state.json                         step, epoch, samples, and what the run was trained with
  manifest.json                      size and SHA-256 of each file above; written last
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simpletuner.core.errors import TrainingError
from simpletuner.core.events import Bus, CheckpointSaved
from simpletuner.core.files import (
    PARTIAL,
    RunFolder,
    fsync_folder,
    publish_folder,
    read_json,
    remove_folder,
    sha256_file,
    sweep,
    write_json,
)
from simpletuner.core.tensors import read_tensors, write_tensors
from simpletuner.optim.build import load_optimizer_tensors, optimizer_tensors
from simpletuner.training.identity import check_data, check_model, machine_told, settings_told

if TYPE_CHECKING:
    from simpletuner.adapters.weights import Weights
    from simpletuner.training.state import TrainState

_NAME = re.compile(r"checkpoint-(\d+)")
_FORMAT = 3
"""Of all files of a checkpoint; kept in its manifest."""

_NEEDED = frozenset({"trainable.safetensors", "optimizer.safetensors", "state.json"})


class DamagedCheckpoint(TrainingError):
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
        described = read_json(manifest)
        format_, files = described["format"], dict(described["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder.name}/manifest.json cannot be read") from error
    if format_ != _FORMAT:
        raise DamagedCheckpoint(
            f"{folder.name} is of another version of simpletuner: its format is {format_}, this"
            f" version reads {_FORMAT}"
        )
    for name in sorted(_NEEDED - files.keys()):
        raise DamagedCheckpoint(f"{folder.name}/manifest.json does not list {name}")
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
        """Write ``checkpoint-N`` whole, then remove the oldest over the limit.

        Raises:
            TrainingError: The disk refused; the checkpoints before it are as they were.
        """
        began = time.perf_counter()
        final = self.folder.checkpoint(state.step)
        partial = final.with_name(f"{final.name}{PARTIAL}")
        with self.folder.writing(final.name):
            try:
                if partial.exists():
                    shutil.rmtree(partial)
                partial.mkdir(parents=True)
                self._write(partial, state)
                publish_folder(partial, final)
            except OSError:  # on a full disk what is half written must not take the room
                shutil.rmtree(partial, ignore_errors=True)
                raise
        self._rotate(final)
        seconds = time.perf_counter() - began
        self.bus.emit(CheckpointSaved(step=state.step, folder=final, seconds=seconds))
        return final

    def _write(self, folder: Path, state: TrainState) -> None:
        trainable = self.weights.trainable
        with self.weights.at("eval"):
            trainable.export(folder, self.metadata(state))
        with self.weights.at("raw"):
            tensors = {
                "trainable": trainable.parameters(),
                "optimizer": optimizer_tensors(self.weights.optimizer, trainable.groups()),
            }
            if self.weights.ema is not None:
                tensors["ema"] = self.weights.ema.shadow
            if self.weights.scaler is not None:
                tensors["scaler"] = self.weights.scaler.tensors()
            for name, found in tensors.items():
                ready = {k: v.detach().cpu().contiguous() for k, v in found.items()}
                write_tensors(folder / f"{name}.safetensors", ready)
        write_json(folder / "state.json", state.as_dict())
        files = {
            path.relative_to(folder).as_posix(): {
                "size": path.stat().st_size,
                "sha256": sha256_file(path),
            }
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        write_json(folder / "manifest.json", {"format": _FORMAT, "files": files})

    def _rotate(self, newest: Path) -> None:
        kept = [path for _, path in found_checkpoints(self.folder.root)]
        for path in kept[self.limit or len(kept) :]:
            if path == newest:
                continue
            try:
                remove_folder(path)
            except OSError as error:  # the new one is complete: nothing is lost by keeping more
                self.bus.notice(f"{path.name} cannot be removed: {error.strerror}", "warning")

    def _recover(self) -> None:
        """Name a checkpoint that a kill left whole but unnamed; remove other leavings of kills."""
        for partial in sorted(self.folder.root.glob(f"checkpoint-*{PARTIAL}")):
            final = partial.with_suffix("")
            if final.exists():
                continue
            try:
                verify(partial)
            except DamagedCheckpoint:
                continue
            sweep(partial)
            with self.folder.writing(final.name):
                publish_folder(partial, final)
        self.folder.sweep()

    # --- resuming ------------------------------------------------------------------------------

    def resume(self, wanted: str, *, on_data_change: str) -> Path | None:
        """Restore weights, optimizer and state in place.

        Args:
            wanted: ``latest``, ``none``, a checkpoint's name in the output folder, or its path.
            on_data_change: ``refuse`` or ``continue``.

        Returns:
            The checkpoint used, or None for a fresh start.

        Raises:
            TrainingError: The one named does not exist or is damaged, none verifies, or its
                tensors are of another model or optimizer.
            DataError: The data is not what the checkpoint was trained on.
        """
        self._recover()
        folder = self._choose(wanted)
        if folder is None:
            self._set_aside(0)
            return None
        facts = read_json(folder / "state.json")
        self._check(facts, on_data_change)
        self._load_trainable(folder)
        load_optimizer_tensors(
            self.weights.optimizer,
            self.weights.trainable.groups(),
            read_tensors(folder / "optimizer.safetensors"),
        )
        self._load_average(folder)
        scaler, file = self.weights.scaler, folder / "scaler.safetensors"
        if scaler is not None and file.is_file():  # else it begins anew, as in a run of its own
            scaler.load(read_tensors(file))
        self.state.step = facts["step"]
        self.state.epoch = facts["epoch"]
        self.state.samples_seen = facts["samples_seen"]
        self.state.skipped = facts["skipped"]
        self._set_aside(self.state.step + 1)
        if folder.resolve().parent == self.folder.root.resolve():
            self._rotate(folder)  # a kill at the rename or after it left one more than the limit
        return folder

    def _set_aside(self, first: int) -> None:
        """Move checkpoints of step `first` and later out of the way: they are of another future.

        Rotation would keep them for the larger number, and the next start would resume them.
        """
        others = [path for step, path in found_checkpoints(self.folder.root) if step >= first]
        if not others:
            return
        aside = next(
            place
            for number in count(1)
            if not (place := self.folder.root / f"previous-{number}").exists()
        )
        with self.folder.writing(aside.name):
            aside.mkdir()
            for path in others:
                path.rename(aside / path.name)
            fsync_folder(self.folder.root)
        names = ", ".join(path.name for path in reversed(others))
        self.bus.notice(
            f"{names} of an earlier run moved to {aside.name}/; remove it when you like"
        )

    def _choose(self, wanted: str) -> Path | None:
        if wanted == "none":
            return None
        if wanted != "latest":
            folder = self.folder.root / wanted
            if not folder.is_dir():
                folder = Path(wanted).expanduser()
            if not folder.is_dir():
                raise TrainingError(
                    f"resume_from_checkpoint: {wanted} is neither a folder nor a checkpoint in"
                    f" {self.folder.root}",
                    fix=f"there are: {self._names()}",
                )
            try:
                verify(folder)
            except DamagedCheckpoint as error:
                raise TrainingError(
                    f"resume_from_checkpoint: {error.message}",
                    fix=f"resume_from_checkpoint=latest takes the newest that is whole; there are:"
                    f" {self._names()}",
                ) from None
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

    def _check(self, facts: Mapping[str, Any], on_data_change: str) -> None:
        """Refuse what may not differ from the checkpoint, and tell of what may."""
        state = self.state
        check_model(facts["model"], state.model)
        data = check_data(facts["data"], state.data, on_data_change)
        for text, level in (
            (data, "info"),
            (settings_told(facts["settings"], state.settings), "info"),
            (machine_told(facts, state.as_dict()), "warning"),
        ):
            if text:
                self.bus.notice(text, level)

    def _load_average(self, folder: Path) -> None:
        ema, file = self.weights.ema, folder / "ema.safetensors"
        if ema is not None and file.is_file():
            ema.load(read_tensors(file))
        elif ema is not None:
            ema.load(self.weights.trainable.parameters())
            self.bus.notice(f"{folder.name} holds no average: it begins with the weights of now")

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
                fix="set what is trained (lora_rank, peft_lora_target_modules …) back, or start"
                " over with resume_from_checkpoint=none",
            )
        with torch.no_grad():
            for name, parameter in ours.items():
                parameter.copy_(saved[name])
