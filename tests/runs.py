"""Runs for tests: a folder of pictures, the two settings files, and the command line in-process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from simpletuner.apps.cli import main

SHAPES = ((96, 64), (64, 96), (80, 80), (128, 64))


def make_pictures(folder: Path, count: int = 8) -> Path:
    """Coloured gradients in four shapes, named as captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        width, height = SHAPES[number % len(SHAPES)]
        x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
        pixels = np.stack([x, y, np.full_like(x, 30 * number % 256)], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"a_picture_number_{number}.png")
    return folder


def fill_the_memory(*_: object, **__: object) -> None:
    """Ask for more than any address space has: the CPU's own refusal."""
    torch.empty(1 << 50, dtype=torch.uint8)


class Run:
    """A configuration in a folder of its own."""

    def __init__(self, root: Path, model: Path, pictures: Path | None = None) -> None:
        self.root = root
        self.pictures = pictures or make_pictures(root / "pictures")
        self.settings: dict[str, Any] = {
            "model_type": "lora",
            "model_family": "sdxl",
            "pretrained_model_name_or_path": str(model),
            "output_dir": str(root / "out"),
            "mixed_precision": "no",
            "gradient_checkpointing": False,
            "train_batch_size": 2,
            "max_train_steps": 4,
            "lora_rank": 4,
            "learning_rate": 1e-3,
            "lr_scheduler": "cosine",
            "checkpoint_step_interval": 2,
            "validation_prompt": "a picture",
            "validation_disable_unconditional": True,
            "validation_resolution": "64x96",
            "validation_num_inference_steps": 2,
            "validation_step_interval": 0,
            "disable_benchmark": True,
        }
        self.more: list[Mapping[str, Any]] = []
        self.dataset: dict[str, Any] = {
            "id": "pictures",
            "type": "local",
            "instance_data_dir": str(self.pictures),
            "resolution": 64,
            "resolution_type": "pixel_area",
            "aspect_bucket_alignment": 16,
            "crop": False,
        }

    @property
    def out(self) -> Path:
        """The output folder."""
        return Path(self.settings["output_dir"])

    def write(self, **settings: Any) -> Path:
        """Write both files; returns config.json."""
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / "config.json"
        path.write_text(json.dumps({**self.settings, **settings}, indent=1))
        entries = json.dumps([self.dataset, *self.more], indent=1)
        (self.root / "multidatabackend.json").write_text(entries)
        return path

    def train(self, **settings: Any) -> int:
        """`simpletuner train`; returns its exit code."""
        return main(["train", "--config", str(self.write(**settings))])

    def events(self, kind: str | None = None) -> list[Mapping[str, Any]]:
        """What events.jsonl holds, of one kind or all."""
        lines = (self.out / "events.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return [event for event in found if kind in (None, event["event"])]

    def notices(self) -> str:
        """What the user was told besides."""
        return "\n".join(event["text"] for event in self.events("notice"))

    def losses(self) -> list[float]:
        """The loss of every step that was told."""
        return [event["loss"] for event in self.events("step")]

    def encoded(self) -> int:
        """Entries encoded in all starts so far."""
        ends = [e for e in self.events("stage") if e["state"] == "finished"]
        return sum(
            e["total"]
            for e in ends
            if e["stage"] in ("text embeddings", "latents") and "in the cache" not in e["note"]
        )
