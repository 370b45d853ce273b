"""A tiny family that counts what is opened and encoded, pictures, and datasets of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from simpletuner.cache.latents import LatentCache, open_stores
from simpletuner.cache.settings import CacheSettings
from simpletuner.core.events import Bus
from simpletuner.core.seeds import Seeds
from simpletuner.core.types import Place
from simpletuner.data.settings import DatasetSettings
from simpletuner.data.source import DataSource
from simpletuner.models.families.sdxl import SDXL
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings

if TYPE_CHECKING:
    from simpletuner.models.family import Shrink

PLACE = Place(torch.device("cpu"), torch.float32)


@dataclass(frozen=True)
class Watched(SDXL):
    """The real family; remembers what was opened, batch sizes, and the seeds of the noise."""

    opened: list[Any] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def open_text(self, place: Place, shrink: Shrink | None = None) -> Any:
        pipe = super().open_text(place, shrink)
        self.opened.append(weakref.ref(pipe.text_encoder))
        return pipe

    def open_vae(self, device: torch.device, dtype: torch.dtype) -> Any:
        vae = super().open_vae(device, dtype)
        self.opened.append(weakref.ref(vae))
        return vae

    def encode_text(self, pipe: Any, captions: Sequence[str]) -> list[Any]:
        self.batches.append(len(captions))
        return super().encode_text(pipe, captions)

    def encode_pixels(self, vae: Any, pixels: torch.Tensor, generators: Sequence[Any]) -> Any:
        self.batches.append(len(pixels))
        self.seeds.extend(generator.initial_seed() for generator in generators)
        return super().encode_pixels(vae, pixels, generators)


def watched(folder: Path) -> Watched:
    settings = ModelSettings(model_family="sdxl", pretrained_model_name_or_path=str(folder))
    family = open_family(settings)
    return Watched(family.checkpoint, family.options)


def picture(path: Path, number: int, size: tuple[int, int] = (80, 80)) -> Path:
    """Write a picture that follows from `number`."""
    noise = np.random.default_rng(number).integers(0, 256, (size[1] // 8, size[0] // 8, 3))
    image = Image.fromarray(noise.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def dataset(
    root: Path, name: str = "set", masks: str = "", control: str = "", **more: Any
) -> DataSource:
    """The dataset of the pictures in `root`/`name`, with what goes with them in other folders."""
    settings = DatasetSettings(
        **{
            "id": name,
            "instance_data_dir": root / name,
            "cache_dir_vae": root / "vae" / name,
            "resolution": 64,
            "resolution_type": "pixel",
            "aspect_bucket_alignment": 16,
            **more,
        }
    )
    beside = [
        DatasetSettings(id=folder, conditioning_type=kind, instance_data_dir=root / folder)
        for folder, kind in ((masks, "mask"), (control, "controlnet"))
        if folder
    ]
    return DataSource.open(
        settings,
        index_folder=root / "index",
        paired=beside,
        bus=Bus(),
    )


def latent_cache(
    family: SDXL, *sources: DataSource, place: Place = PLACE, seed: int = 0, **settings: Any
) -> LatentCache:
    return LatentCache(family, open_stores(sources), CacheSettings(**settings), place, Seeds(seed))


def read(cache: LatentCache, source: DataSource, row: int, epoch: int = 0) -> torch.Tensor:
    """[C, h, w] of one row."""
    return cache.latents(source, [source.sample(row, epoch, 0, Seeds(0))], epoch)[0]
