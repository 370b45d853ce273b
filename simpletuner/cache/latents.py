"""Latents by content and geometry: a decode pool, groups of one size, one encoder, packs.

Letters: B batch, C channels, H W the crop in px, h w in latent cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ref

import numpy as np
import torch

from simpletuner.cache.fingerprint import latent_keys
from simpletuner.cache.pictures import Task, decode_now, decoding
from simpletuner.cache.stage import (
    EncodingStage,
    encoding,
    nothing_to_encode,
    release_memory,
    require_finite,
)
from simpletuner.cache.store import TensorStore, naming
from simpletuner.core.errors import CacheError
from simpletuner.core.seeds import Seeds, key64
from simpletuner.data.excluded import listed
from simpletuner.data.pixels import PictureError

if TYPE_CHECKING:
    from simpletuner.cache.settings import CacheSettings
    from simpletuner.core.events import Bus
    from simpletuner.core.types import Place, Sample
    from simpletuner.data.control import Pictures
    from simpletuner.data.source import DataSource
    from simpletuner.models.family import Family

STAGE = "latents"
TENSOR = "latents"
_FIX = "set vae_dtype to bf16 or fp32"


class LatentCache:
    """The latents of pictures, on disk.

    The posterior's noise of a cached latent follows from the picture's content and its dataset, so
    that a latent depends neither on its batch nor on the order of encoding.

    Args:
        family: Whose VAE they are encoded by.
        stores: Where they are kept, by the id of the dataset; see `open_stores`.
        settings: How the VAE goes about it.
        place: Where and in what dtype the VAE runs.
        seeds: Of the noise that is drawn afresh where nothing is kept.

    Attributes:
        stores: As above.
    """

    def __init__(
        self,
        family: Family,
        stores: Mapping[str, TensorStore],
        settings: CacheSettings,
        place: Place,
        seeds: Seeds,
    ) -> None:
        self._family, self._settings = family, settings
        self.stores = stores
        self._place, self._seeds = place, seeds
        self._model = family.fingerprint("vae")
        self._vae: Any = None

    # --- before training -------------------------------------------------------------------------

    def prepare(
        self, sources: Sequence[DataSource], bus: Bus, beside: Sequence[Pictures] = ()
    ) -> tuple[DataSource, ...]:
        """Encode what is missing; without anything missing, no VAE is opened.

        Args:
            sources: The datasets.
            bus: Told of progress and of what is left out.
            beside: What else is encoded, of which each picture is known to be whole.

        Returns:
            The sources to train on: `sources` themselves, or without the pictures that turned out
            to be undecodable, each of which was named.

        Raises:
            DataError: Too many of a dataset's pictures cannot be decoded, or one was changed since
                it was indexed.
            CacheError: The cache cannot be written, or the memory is full.
        """
        kept = [each for each in (*sources, *beside) if _before_training(each)]
        tasks = self._missing(kept)
        if not tasks:
            if kept:
                nothing_to_encode(STAGE, sum(map(len, kept)), bus)
            return tuple(sources)
        try:
            faults = self._encode_all(tasks, bus)
        finally:
            self._release()
        return tuple(_without(s, faults[s.id], bus) if s.id in faults else s for s in sources)

    def _missing(self, sources: Sequence[Pictures]) -> list[Task]:
        """What has to be encoded, copies of one picture once, equal sizes together.

        The largest come first: they are those that may not fit the device.
        """
        tasks = []
        for source in sources:
            keys = self._all_keys(source)
            first: dict[bytes, int] = {}
            for row in np.flatnonzero(self.stores[source.id].locate(keys) < 0).tolist():
                first.setdefault(keys[row], row)
            for key, row in first.items():
                content = bytes(source.content[row]).hex()
                tasks.append(Task(source, row, content, key, source.geometry(row).target))
        order = {source.id: number for number, source in enumerate(sources)}

        def place(task: Task) -> tuple[Any, ...]:
            return -task.size[0] * task.size[1], task.size, order[task.source.id], task.row

        return sorted(tasks, key=place)

    def _encode_all(self, tasks: Sequence[Task], bus: Bus) -> dict[str, dict[str, str]]:
        """Encode `tasks`; returns, by dataset and content, why some could not be decoded."""
        faults: dict[str, dict[str, str]] = {}
        group: list[tuple[Task, torch.Tensor]] = []
        with EncodingStage(STAGE, len(tasks), bus, _FIX) as stage, decoding(tasks) as decoded:
            for task, pixels in decoded:
                if isinstance(pixels, PictureError):
                    faults.setdefault(task.source.id, {})[task.content] = pixels.reason
                    stage.advance(1)
                    continue
                if group and not task.joins([each for each, _ in group]):
                    self._encode_group(group, stage)
                    group = []
                group.append((task, pixels))
            if group:
                self._encode_group(group, stage)
        return faults

    def _encode_group(
        self, group: Sequence[tuple[Task, torch.Tensor]], stage: EncodingStage
    ) -> None:
        tasks = [task for task, _ in group]
        latents = self._encode(
            [pixels for _, pixels in group],
            [_fixed_noise(task.content, task.source.id) for task in tasks],
        )
        stage.put(
            [
                (self.stores[task.source.id], task.key, {TENSOR: latent})
                for task, latent in zip(tasks, latents, strict=True)
            ]
        )

    def folder(self, source: Pictures) -> Path:
        """Where the latents of a dataset that keeps them are."""
        return self.stores[source.id].folder

    def keys(self, source: Pictures) -> set[bytes]:
        """The entries of a dataset's pictures."""
        return set(self._all_keys(source))

    def factor(self, source: Pictures) -> int | None:
        """Pixels along the edge of a latent cell of a dataset; None while nothing is kept of it."""
        keys = self._all_keys(source)
        rows = self.stores[source.id].locate(keys)
        there = np.flatnonzero(rows >= 0)
        if not len(there):
            return None
        (slot,) = self.stores[source.id].layout(int(rows[there[0]]))
        return int(source.buckets[there[0], 1]) // int(slot.shape[-2])

    # --- while training --------------------------------------------------------------------------

    def latents(self, source: Pictures, samples: Sequence[Sample], epoch: int) -> torch.Tensor:
        """[B, C, h, w] fp32 of draws of one size, on the CPU.

        Raises:
            CacheError: An entry is missing or damaged, or the memory is full.
            DataError: A picture that had to be encoded now cannot be decoded.
        """
        if source.settings.vae_cache_disable:
            return self._fresh(source, samples, epoch)
        store = self.stores[source.id]
        drawn = [sample.id for sample in samples], [sample.geometry for sample in samples]
        keys = self._keys(source, *drawn)
        rows = store.locate(keys)
        if (rows < 0).any():
            absent = [i for i, row in enumerate(rows) if row < 0]
            if not source.settings.vae_cache_ondemand:
                raise CacheError(
                    f"the latents of {samples[absent[0]].path} are not in the cache {store.folder}",
                    fix="start again: missing latents are encoded before training",
                )
            self._add(source, {keys[i]: samples[i] for i in absent})
            rows = store.locate(keys)
        (slot,) = store.layout(int(rows[0]))
        batch = torch.empty((len(rows), *slot.shape), dtype=slot.dtype)
        for i, row in enumerate(rows.tolist()):
            with naming(f"the latents of {samples[i].path}"):
                store.read_into(row, {TENSOR: batch[i]})
        return batch

    def _add(self, source: Pictures, samples: Mapping[bytes, Sample]) -> None:
        """Encode pictures that training meets for the first time, and keep them."""
        noise = [_fixed_noise(sample.id, source.id) for sample in samples.values()]
        latents = self._encode_samples(source, list(samples.values()), noise)
        for key, latent in zip(samples, latents, strict=True):
            self.stores[source.id].put(key, {TENSOR: latent})

    def _fresh(self, source: Pictures, samples: Sequence[Sample], epoch: int) -> torch.Tensor:
        noise = [
            self._seeds.generator("posterior", s.id, s.dataset, epoch, s.occurrence)
            for s in samples
        ]
        return self._encode_samples(source, samples, noise)

    def _encode_samples(
        self, source: Pictures, samples: Sequence[Sample], noise: Sequence[torch.Generator]
    ) -> torch.Tensor:
        size = source.settings.vae_batch_size
        parts = []
        for start in range(0, len(samples), size):
            pixels = decode_now(source, samples[start : start + size])
            parts.append(self._encode(pixels, noise[start : start + size]).cpu())
            require_finite(parts[-1], STAGE, _FIX)
        return torch.cat(parts)

    def close(self) -> None:
        """Let the VAE go, and seal what was encoded on demand."""
        self._release()
        for store in self.stores.values():
            store.seal()

    def _release(self) -> None:
        if self._vae is not None:
            model, self._vae = ref(self._vae), None
            release_memory(self._place.device, [model])

    # --- both ------------------------------------------------------------------------------------

    def _encode(
        self, pixels: Sequence[torch.Tensor], noise: Sequence[torch.Generator]
    ) -> torch.Tensor:
        """[B, C, h, w] fp32 on the device, of B uint8 pictures [3, H, W]."""
        if self._vae is None:
            self._vae = self.open_vae()
        count, (_, height, width) = len(pixels), pixels[0].shape
        what = f"{count} {'pictures' if count > 1 else 'picture'} of {width}x{height}"
        with encoding(what, self._less_memory(count)), torch.no_grad():
            batch = torch.stack(list(pixels)).to(self._place.device)
            return self._family.encode_pixels(self._vae, batch.float() / 127.5 - 1, noise).float()

    def _less_memory(self, count: int) -> str:
        """What is left to do where `count` pictures at once are too much."""
        if count > 1:
            return "lower vae_batch_size (a dataset may have its own) and start again"
        tile = "" if self._settings.vae_enable_tiling else "set vae_enable_tiling true or "
        return f"{tile}lower the resolution and start again with --on_data_change continue"

    def open_vae(self) -> Any:
        """The family's VAE as the settings want it; whoever opens it lets it go."""
        vae = self._family.open_vae(self._place.device, self._place.dtype)
        if self._settings.vae_enable_tiling:
            vae.enable_tiling()
        if self._settings.vae_enable_slicing:
            vae.enable_slicing()
        return vae

    def _all_keys(self, source: Pictures) -> list[bytes]:
        return self._keys(source, source.content, source.boxes())

    def _keys(self, source: Pictures, contents: Any, boxes: Any) -> list[bytes]:
        return latent_keys(
            contents,
            boxes,
            dataset=source.id,
            model=self._model,
            dtype=str(self._place.dtype),
            pixels=source.settings.image_background.lower(),
            tiling=self._settings.vae_enable_tiling,
        )


def open_stores(
    sources: Sequence[Pictures], *, rank: int = 0, bus: Bus | None = None
) -> dict[str, TensorStore]:
    """The store of every dataset that keeps its latents, by its id; one folder has one store."""
    stores: dict[Path, TensorStore] = {}
    found = {}
    for source in sources:
        settings = source.settings
        if settings.vae_cache_disable:
            continue
        assert settings.cache_dir_vae is not None, "inherited values are filled in"
        folder = settings.cache_dir_vae.resolve()
        if folder not in stores:
            stores[folder] = TensorStore.open(
                folder, rank=rank, write_batch_size=settings.write_batch_size, bus=bus
            )
        found[source.id] = stores[folder]
    return found


def _before_training(source: Pictures) -> bool:
    return not (source.settings.vae_cache_disable or source.settings.vae_cache_ondemand)


def _without(source: DataSource, faults: Mapping[str, str], bus: Bus) -> DataSource:
    """`source` without the pictures of these contents, copies included; names each of them."""
    contents = [bytes(content).hex() for content in source.content]
    reasons = {source.path(row): faults[c] for row, c in enumerate(contents) if c in faults}
    bus.notice(
        f"dataset {source.id}: left out, repair or remove them\n{listed(reasons)}", "warning"
    )
    return source.without(reasons)


def _fixed_noise(content: str, dataset: str) -> torch.Generator:
    """The posterior's noise of a latent that is kept."""
    return torch.Generator("cpu").manual_seed(key64("posterior", content, dataset) >> 1)
