"""Small folders of pictures, and datasets opened on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from simpletuner.core.events import Bus, Notice
from simpletuner.core.seeds import Seeds
from simpletuner.data.settings import DatasetSettings
from simpletuner.data.source import DataSource
from tests.hearing import Heard

SEEDS = Seeds(42)


def noise(name: str, size: tuple[int, int]) -> Image.Image:
    seed = sum(map(ord, name)) * 1000 + size[0]
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def picture(folder: Path, name: str, size: tuple[int, int] = (96, 64), caption: str | None = None):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(name, size).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def entry(folder: Path, **rest: Any) -> DatasetSettings:
    given = {"id": "cats", "instance_data_dir": folder, "resolution": 64, **rest}
    return DatasetSettings.model_validate(
        {"aspect_bucket_alignment": 8, "caption_dropout_probability": 0, "max_workers": 2} | given
    )


def opened(folder: Path, index: Path | None = None, **rest: Any) -> DataSource:
    where = index or folder.parent / "cache"
    return DataSource.open(entry(folder, **rest), index_folder=where, bus=Bus())


def told(folder: Path, **rest: Any) -> tuple[DataSource, str]:
    heard = Heard()
    bus = Bus([heard])
    source = DataSource.open(entry(folder, **rest), index_folder=folder.parent / "c", bus=bus)
    bus.close()
    return source, "\n".join(event.text for event in heard.events if isinstance(event, Notice))
