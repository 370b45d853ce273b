"""Everything that needs a text encoder or the VAE, before the denoiser is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from simpletuner.cache.caches import Caches
from simpletuner.cache.latents import LatentCache, open_stores
from simpletuner.cache.store import TensorStore
from simpletuner.cache.text import TextCache
from simpletuner.cache.upkeep import damaged
from simpletuner.core.errors import DataError
from simpletuner.core.types import Place
from simpletuner.data.excluded import listed
from simpletuner.precision.dtypes import dtype_of

if TYPE_CHECKING:
    from simpletuner.cache.settings import CacheSettings
    from simpletuner.core.events import Bus
    from simpletuner.core.seeds import Seeds
    from simpletuner.data.settings import TextEmbedsSettings
    from simpletuner.data.source import DataSource
    from simpletuner.models.family import Family
    from simpletuner.precision.quantise import Quantiser
    from simpletuner.validation.prompts import Prompts


def vae_place(settings: CacheSettings, place: Place) -> Place:
    """Where the VAE runs: beside the model, in its own dtype if the user named one."""
    if settings.vae_dtype == "default":
        return place
    return Place(place.device, dtype_of(settings.vae_dtype), place.rank, place.world)


def _fit_the_grid(family: Family, sources: Sequence[DataSource]) -> None:
    """Every bucket fits the denoiser; a dataset may have an alignment of its own.

    Raises:
        DataError: One does not.
    """
    for source in sources:
        if (source.buckets % family.alignment).any():
            raise DataError(
                f"{source.id}: its pictures are cut to a multiple of"
                f" {source.settings.aspect_bucket_alignment} px, {family.name} needs"
                f" {family.alignment}",
                fix=f"set its aspect_bucket_alignment to a multiple of {family.alignment}",
            )


def _look_for_damage(sources: Sequence[DataSource], bus: Bus) -> None:
    """Read the latents of the datasets that ask for it; those that are damaged count as missing."""
    for source in sources:
        folder = source.settings.cache_dir_vae
        if source.settings.scan_for_errors and folder is not None:
            found = len(damaged(folder))
            bus.notice(
                f"dataset {source.id}: {found} of its encoded pictures are damaged and encoded"
                " again"
                if found
                else f"dataset {source.id}: its encoded pictures are whole"
            )


def _with_whole_masks(source: DataSource, bus: Bus) -> DataSource:
    """`source` without the pictures whose masks cannot be decoded, each of which is named."""
    while (rest := source.with_whole_masks()) is not source:
        out = {path: why for path, why in rest.rejects.items() if path not in source.rejects}
        bus.notice(f"dataset {source.id}: left out, repair the masks\n{listed(out)}", "warning")
        source = rest
    return source


def open_caches(
    family: Family,
    sources: Sequence[DataSource],
    text_embeds: TextEmbedsSettings,
    settings: CacheSettings,
    quantiser: Quantiser,
    seeds: Seeds,
    place: Place,
    bus: Bus,
) -> tuple[TextCache, LatentCache]:
    """Both caches as they are on the disk; nothing is encoded."""
    assert text_embeds.cache_dir is not None, "inherited values are filled in"
    store = TensorStore.open(
        text_embeds.cache_dir,
        rank=place.rank,
        write_batch_size=text_embeds.write_batch_size,
        bus=bus,
    )
    size = text_embeds.text_encoder_batch_size
    text = TextCache(family, store, place, batch_size=size, encoders=quantiser)
    stores = open_stores(sources, rank=place.rank, bus=bus)
    return text, LatentCache(family, stores, settings, vae_place(settings, place), seeds)


def precompute(
    family: Family,
    sources: Sequence[DataSource],
    prompts: Prompts,
    text_embeds: TextEmbedsSettings,
    settings: CacheSettings,
    quantiser: Quantiser,
    seeds: Seeds,
    place: Place,
    bus: Bus,
) -> Caches:
    """Text embeddings, then latents; only what is missing is encoded, and encoders are freed.

    The caches' sources are those to train on: without pictures that could not be decoded, or
    whose masks could not.
    """
    _fit_the_grid(family, sources)
    _look_for_damage(sources, bus)
    text, latents = open_caches(
        family, sources, text_embeds, settings, quantiser, seeds, place, bus
    )
    while True:
        sources = [_with_whole_masks(source, bus) for source in sources]
        captions = {f"dataset {source.id}": source.all_captions() for source in sources}
        text.prepare({**captions, "validation prompts": prompts.captions()}, bus)
        sound = latents.prepare(sources, bus)
        if all(new is old for old, new in zip(sources, sound, strict=True)):
            return Caches(sound, latents, text, seeds)
        sources = sound  # without what is undecodable, others may be drawn, or cut to other sizes
