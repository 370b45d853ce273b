"""The run that faults are done to: two datasets, four steps, checkpoints after two and four."""

from __future__ import annotations

import json
import os
import re
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

Strike = tuple[str, str, int]
"""Operation, `plain` path, and the how manieth of these in a start."""

_WRITTEN = ("mkdir", "write", "half", "fsync", "replace", "rmdir")
"""What befalls a file that is written through a folder of its own."""


def _each(path: str, *whats: str, at: int = 1) -> tuple[Strike, ...]:
    return tuple((what, path, at) for what in whats or _WRITTEN)


_TEXT, _VAE = "cache/text/FAMILY", "cache/vae/FAMILY"
_SAVED, _IMAGES = "checkpoint-2.partial", "validation_images"
_RESULT = "pytorch_lora_weights.safetensors"
CHAIN: tuple[Strike, ...] = (
    *(("mkdir", ".", 1), ("create", ".lock", 1)),
    # the index of a dataset
    *(("mkdir", "cache/index", 1), ("mkdir", "cache", 1)),
    *_each("cache/index/one.parquet"),
    *(("half", "cache/index/two.parquet", 1), ("fsync", "cache/index", 1)),
    # digests of the model's files; there are more of them to come
    *(*_each("cache/digests.json"), ("fsync", "cache", 1)),
    # a pack and its part; once the pack has its name, the next start rebuilds the part
    *(("mkdir", _TEXT, 1), ("mkdir", "cache/text", 1)),
    *_each(f"{_TEXT}/PACK.partial", "create", "write", "half"),
    *_each(f"{_TEXT}/PACK.partial", "write", "half", at=2),
    *(("fsync", f"{_TEXT}/PACK.partial", 1), ("rename", f"{_TEXT}/PACK.safetensors", 1)),
    *(("fsync", _TEXT, 1), *_each(f"{_TEXT}/PACK.parquet")),
    # two packs, one sealed after the other
    *(("mkdir", f"{_VAE}/two", 1), ("mkdir", _VAE, 1), ("mkdir", "cache/vae", 1)),
    *_each(f"{_VAE}/two/PACK.partial", "create", "write", "half"),
    *(("half", f"{_VAE}/two/PACK.partial", 2), ("fsync", f"{_VAE}/two/PACK.partial", 1)),
    *(("rename", f"{_VAE}/two/PACK.safetensors", 1), ("fsync", f"{_VAE}/two", 1)),
    *_each(f"{_VAE}/two/PACK.parquet"),
    *(("half", f"{_VAE}/one/PACK.partial", 2), ("half", f"{_VAE}/one/PACK.parquet", 1)),
    # what a start writes down
    *(*_each("resolved_config.json"), ("fsync", ".", 1)),
    *_each("run.json"),
    # a checkpoint; once it is whole, the next start names it
    *(("mkdir", _SAVED, 1), *_each(f"{_SAVED}/{_RESULT}"), ("fsync", _SAVED, 1)),
    *_each(f"{_SAVED}/trainable.safetensors"),
    *_each(f"{_SAVED}/optimizer.safetensors"),
    *_each(f"{_SAVED}/state.json"),
    *_each(f"{_SAVED}/manifest.json"),
    *(("rename", "checkpoint-2", 1), ("fsync", ".", 1)),
    # pictures, after the sheet of an earlier run
    ("unlink", "before_after.png", 1),
    *(("mkdir", _IMAGES, 1), *_each(f"{_IMAGES}/step_3_validation_0_64x96.png")),
    *(("fsync", _IMAGES, 1), *_each(f"{_IMAGES}/step_3_validation_0_64x96.json")),
    # the next checkpoint, named by the next start, and the removal of the one before
    *(("half", "checkpoint-4.partial/optimizer.safetensors", 1), ("rename", "checkpoint-4", 1)),
    *_each("checkpoint-2.removing", "rename"),
    *_each("checkpoint-2.removing/FILE", "unlink", at=2),
    *_each("checkpoint-2.removing", "rmdir"),
    # the result
    *(("mkdir", "staging", 1), *_each(f"staging/{_RESULT}"), ("fsync", "staging", 1)),
    *(("replace", _RESULT, 1), ("fsync", ".", 3), ("rmdir", "staging", 1)),
    ("half", "run.json", 2),
)
"""One after the other on one folder: each of them is still ahead after the ones before it."""


def kind(what: str, path: str) -> str:
    """What a point has in common with others of which one stands for all."""
    path = re.sub(r"checkpoint-\d+", "checkpoint-N", path)
    path = re.sub(r"step_\d+_\w+", "step_N", path)
    return f"{what} {re.sub(r'/(one|two)(?=[./]|$)', '/DATASET', path)}"


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
