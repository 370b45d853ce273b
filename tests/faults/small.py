"""The run that faults are done to: two datasets, four steps, checkpoints after two and four."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tests.faults.forks import Forks
from tests.runs import Run, make_pictures

FAMILIES = (("sdxl", "tiny_sdxl"), ("sd3", "tiny_sd3"))
"""Family and the fixture that builds its tiny model."""

LATENTS = 4
CAPTIONS = LATENTS + 3
"""Of every picture; the dropped one, the validation prompt and the negative one."""

_ONE, _TWO = "cache/index/.one.", "cache/index/.two."
_TEXT, _VAE = "cache/text/", "cache/vae/"
_PART = ".parquet"
CHAIN = (
    # the index of a dataset
    *((what, _ONE, 1) for what in ("mkdir", "write", "half", "fsync")),
    ("replace", "cache/index/one", 1),
    ("rmdir", _ONE, 1),
    ("half", _TWO, 1),
    ("fsync", "cache/index", 2),
    # a pack and its part; once the pack has its name, the next start rebuilds the part
    ("mkdir", _TEXT, 1),
    *(("create", _TEXT, 1), ("write", _TEXT, 1), ("half", _TEXT, 1)),
    *(("write", _TEXT, 2), ("half", _TEXT, 2), ("fsync", _TEXT, 1), ("rename", _TEXT, 1)),
    ("fsync", _TEXT, 2),
    *((what, _PART, at) for what, at in (("mkdir", 1), ("half", 1), ("fsync", 1), ("replace", 1))),
    # two packs, one sealed after the other
    *(("half", f"{_VAE}", at) for at in (2, 5)),
    # a checkpoint
    ("mkdir", "checkpoint-2", 1),
    ("mkdir", "checkpoint-2.partial/.pytorch", 1),
    ("write", "checkpoint-2.partial/.trainable", 1),
    ("half", "checkpoint-2.partial/.optimizer", 1),
    ("fsync", "checkpoint-2.partial/.state", 1),
    ("half", "checkpoint-2.partial/.manifest", 1),
    ("replace", "checkpoint-2.partial/manifest", 1),
    ("rename", "checkpoint-2", 1),
    # pictures, the next checkpoint, and the removal of the one before
    ("half", "validation_images/.step_3", 1),
    ("half", "checkpoint-4.partial/.trainable", 1),
    ("rename", "checkpoint-4", 1),
    # the result
    *((what, ".pytorch_lora_weights", 1) for what in ("mkdir", "write", "half", "fsync")),
    ("replace", "pytorch_lora_weights", 1),
    ("half", ".run.json", 2),
)
"""Operation, a part of its path, and the how manieth of these: one after the other on one folder,
each of them is still ahead after the ones before it."""


class SmallRun(Run):
    """Two datasets, so that two packs of latents are sealed one after the other."""

    def __init__(self, root: Path, family: str, model: Path, pictures: Path) -> None:
        super().__init__(root, model, pictures)
        self.settings |= {
            "model_family": family,
            "peft_lora_target_modules": ["to_q"],
            "lora_dropout": 0.1,
            "checkpoints_total_limit": 1,
            "validation_num_inference_steps": 1,
            "validation_step_interval": 3,
        }

    def write(self, **settings: Any) -> Path:
        path = super().write(**settings)
        entries = [
            {**self.dataset, "id": name, "instance_data_dir": str(self.pictures / name)}
            for name in ("one", "two")
        ]
        (self.root / "multidatabackend.json").write_text(json.dumps(entries))
        return path

    @property
    def weights(self) -> bytes:
        """The result, as a user loads it."""
        return (self.out / "pytorch_lora_weights.safetensors").read_bytes()


class Small:
    """The unbroken run and its points, and fresh runs to break."""

    def __init__(self, forks: Forks, root: Path, family: str, model: Path) -> None:
        self.forks, self.root, self.family, self.model = forks, root, family, model
        self.pictures = root / "pictures"
        for number, name in enumerate(("one", "two")):
            make_pictures(self.pictures / name, (number + 1) * 2)
            for file in sorted((self.pictures / name).iterdir())[: number * 2]:
                file.unlink()
        for file in self.pictures.rglob("*.png"):  # so old that the index trusts their times
            os.utime(file, (1_700_000_000, 1_700_000_000))
        self._made = 0
        forks.warm(self.fresh())
        self.straight = self.fresh()
        ended = forks.train(self.straight)
        assert ended.code == 0, ended.output
        self.points = ended.points

    def fresh(self) -> SmallRun:
        """A run that has not begun."""
        self._made += 1
        return SmallRun(self.root / f"run-{self._made}", self.family, self.model, self.pictures)

    def copy(self) -> SmallRun:
        """The unbroken run as it ended, in a folder of its own."""
        run = self.fresh()
        shutil.copytree(self.straight.out, run.out)
        return run
