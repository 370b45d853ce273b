"""Everything that needs a text encoder or the VAE, before the denoiser is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from simpletuner.cache.caches import Caches
from simpletuner.cache.controls import ControlCache, encoded_beside
from simpletuner.cache.latents import LatentCache, open_stores
from simpletuner.cache.masks import MaskCache
from simpletuner.cache.store import TensorStore
from simpletuner.cache.text import STAGE, TextCache, TextCaches, titled
from simpletuner.cache.truncation import tell_cut
from simpletuner.cache.upkeep import damaged
from simpletuner.core.errors import DataError
from simpletuner.core.types import Place
from simpletuner.data.excluded import listed
from simpletuner.precision.dtypes import dtype_of, vae_dtype_of

if TYPE_CHECKING:
    from simpletuner.cache.settings import CacheSettings
    from simpletuner.core.events import Bus
    from simpletuner.core.seeds import Seeds
    from simpletuner.data.settings import Datasets, TextEmbedsSettings
    from simpletuner.data.source import DataSource
    from simpletuner.models.family import Family
    from simpletuner.precision.quantise import Quantiser
    from simpletuner.validation.prompts import Prompts


def vae_place(settings: CacheSettings, place: Place) -> Place:
    """Where the VAE runs: beside the model, in the dtype that `vae_dtype_of` names."""
    run = next(name for name in ("fp32", "bf16", "fp16") if dtype_of(name) == place.dtype)
    return replace(place, dtype=dtype_of(vae_dtype_of(settings.vae_dtype, run)))


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


def _with_whole_pairs(source: DataSource, bus: Bus) -> DataSource:
    """`source` without those whose masks and the like cannot be decoded; each is named."""
    while (rest := source.with_whole_pairs()) is not source:
        out = {path: why for path, why in rest.rejects.items() if path not in source.rejects}
        what = "left out, repair what goes with them"
        bus.notice(f"dataset {source.id}: {what}\n{listed(out)}", "warning")
        source = rest
    return source


def open_caches(
    family: Family,
    sources: Sequence[DataSource],
    datasets: Datasets,
    settings: CacheSettings,
    quantiser: Quantiser,
    seeds: Seeds,
    place: Place,
    bus: Bus,
) -> tuple[TextCaches, LatentCache]:
    """All caches as they are on the disk; nothing is encoded."""

    def opened(entry: TextEmbedsSettings) -> TextCache:
        assert entry.cache_dir is not None, "inherited values are filled in"
        size = entry.write_batch_size
        store = TensorStore.open(entry.cache_dir, rank=place.rank, write_batch_size=size, bus=bus)
        return TextCache(
            family,
            store,
            place,
            batch_size=entry.text_encoder_batch_size,
            encoders=quantiser,
            keeps=not entry.text_cache_disable,
            waits=entry.text_cache_ondemand,
        )

    entries = {each.id: each for each in (datasets.text_embeds, *datasets.captions.values())}
    kept = {name: opened(entry) for name, entry in entries.items()}
    own = {dataset: kept[entry.id] for dataset, entry in datasets.captions.items()}
    text = TextCaches(kept[datasets.text_embeds.id], own)
    pictures = [*sources, *encoded_beside(family, sources)]
    stores = open_stores(pictures, rank=place.rank, bus=bus)
    return text, LatentCache(family, stores, settings, vae_place(settings, place), seeds)


def _tell_text(family: Family, captions: Mapping[str, set[str]], bus: Bus) -> None:
    """What becomes of captions where the text encoders train."""
    tell_cut(family, {title: sorted(each) for title, each in captions.items()}, bus)
    count = len(set().union(*captions.values()))
    bus.notice(
        f"{STAGE}: {count} captions, each encoded in the step that trains on it, for the text"
        " encoders train; nothing of them is kept, and the encoders stay loaded"
    )


def precompute(
    family: Family,
    sources: Sequence[DataSource],
    prompts: Prompts,
    datasets: Datasets,
    settings: CacheSettings,
    quantiser: Quantiser,
    seeds: Seeds,
    place: Place,
    bus: Bus,
    *,
    trains_text: bool = False,
) -> Caches:
    """Text embeddings, then latents; only what is missing is encoded, and encoders are freed.

    Where text encoders train (`trains_text`) no caption is encoded here.

    The caches' sources are those given, without pictures that could not be decoded, or whose masks
    could not.
    """
    _fit_the_grid(family, sources)
    _look_for_damage(sources, bus)
    text, latents = open_caches(family, sources, datasets, settings, quantiser, seeds, place, bus)
    while True:
        sources = [_with_whole_pairs(source, bus) for source in sources]
        captions = {source.id: source.all_captions() for source in sources}
        if not trains_text:
            text.prepare(captions, prompts.captions(), bus)
        sound = latents.prepare(sources, bus, encoded_beside(family, sources))
        if all(new is old for old, new in zip(sources, sound, strict=True)):
            if trains_text:
                _tell_text(family, titled(captions, prompts.captions()), bus)
            kept = None if trains_text else text
            controls = ControlCache(latents, sound, family)
            return Caches(sound, latents, kept, seeds, MaskCache(latents.stores), controls)
        sources = sound  # without what is undecodable, others may be drawn, or cut to other sizes
