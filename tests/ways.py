"""Small runs that start from a finished one, told through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.runs import Run, make_pictures

WEIGHTS = "pytorch_lora_weights.safetensors"


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a folder by their path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Way(Run):
    """A run with few adapters and no pictures, of one dataset or of several."""

    def __init__(self, root: Path, model: Path, pictures: Path, cache: Path) -> None:
        super().__init__(root, model, pictures)
        self.settings |= {
            "cache_dir": str(cache),
            "peft_lora_target_modules": ["to_q"],
            "validation_disable": True,
        }

    def steps(self) -> list[int]:
        """The number of every step that was told, in all starts."""
        return [event["step"] for event in self.events("step")]

    def names(self) -> set[str]:
        """The checkpoints, and the folders of earlier ones."""
        folders = {path.name for path in self.out.iterdir() if path.is_dir()}
        return {name for name in folders if name.startswith(("checkpoint-", "previous-"))}

    def recipe(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            (self.out / f"validation_images/{name}.json").read_text()
        )
        return found


class Bench:
    """Pictures, a tiny model, a filled cache, and a finished run of four steps."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model
        self.pictures = make_pictures(root / "pictures")
        self.done = self.fresh(root / "done")
        assert self.done.train() == 0

    def fresh(self, root: Path) -> Way:
        """A run that has not begun."""
        return Way(root, self.model, self.pictures, self.root / "cache")

    def copy(self, root: Path) -> Way:
        """A copy of the finished run."""
        run = self.fresh(root)
        shutil.copytree(self.done.out, run.out)
        return run
