"""What a run trains on: what holds for every dataset, and the entries of the datasets file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from simpletuner.core.files import safe_name
from simpletuner.core.section import Section, setting
from simpletuner.data.caption_settings import (
    CaptionSettings,
    DatasetCaptionSettings,
    caption_contradictions,
)
from simpletuner.data.draw_settings import DatasetDrawSettings, DrawSettings, draw_contradictions
from simpletuner.data.learning_settings import (
    DatasetLearningSettings,
    LearningSettings,
    learning_contradictions,
)
from simpletuner.data.size_settings import DatasetSizeSettings, SizeSettings, size_contradictions
from simpletuner.data.table_settings import (
    DatasetTableSettings,
    TableSettings,
    inherit_columns,
    table_contradictions,
    table_defaults,
)

Storage = Literal["local", "aws", "csv", "huggingface", "webshart"]
DatasetId = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f]+$")]


def _nothing_is_skipped(value: object) -> object:
    if isinstance(value, str) and not value.strip(" ,"):
        return ""
    raise ValueError("is not needed: a start looks at what changed and at nothing else; remove it")


Nothing = Annotated[Literal[""], BeforeValidator(_nothing_is_skipped)]
"""A setting that SimpleTuner's files hold empty, and that has nothing to do here."""


class PictureSettings(SizeSettings, CaptionSettings, LearningSettings):
    """What may be said once for all datasets and again for each of them."""

    image_background: str = setting("#ffffff", pattern=r"^#[0-9a-fA-F]{6}$")
    """The colour that shows through transparent pictures, as #rrggbb."""

    skip_file_discovery: Nothing = setting("")
    """Start-up stages to leave out: none, for a start looks at what changed and at nothing else."""

    allow_excluded: bool = setting(False)
    """Train although more than 5 % of a dataset (and more than two pictures) is left out."""

    max_workers: int = setting(32, ge=1, unit="threads")
    """Most threads that read and decode pictures; more than the processor has cores are not
    started."""


class DataSettings(TableSettings, DrawSettings, PictureSettings):
    """What holds for every dataset that does not say otherwise."""

    data_backend_config: Path | None = setting(None, path=True)
    """The file that lists the datasets; without it, multidatabackend.json beside the settings
    file, in config/, or in output_dir."""

    disable_bucket_pruning: bool = setting(True)
    """Keep buckets that hold fewer pictures than a batch; false is rare_buckets drop, for datasets
    whose rare_buckets is not given."""

    allow_dataset_oversubscription: bool = setting(False, pending=True)
    """Raise the repeats of datasets that are smaller than a batch; they train without it, in
    smaller batches."""

    dataloader_prefetch: bool = setting(False, pending=True)
    """Read batches ahead of the step that needs them."""

    dataloader_prefetch_qlen: int = setting(10, pending=True, ge=1, unit="batches")
    """How many batches are read ahead at most; more hides slow disks and takes memory."""

    aws_max_pool_connections: int = setting(128, pending=True, ge=1, unit="connections")
    """Most connections to an S3 storage at once."""


class EntrySettings(Section):
    """What every entry of the datasets file begins with."""

    id: DatasetId = setting()
    """The dataset's name: it names its caches and must stay the same between runs."""

    type: Storage = setting("local", pending=("aws", "huggingface", "webshart"))
    """Where the files lie: local, in a folder of this machine, or where its table says; csv, at the
    web addresses in csv_file."""

    disabled: bool = setting(False)
    """Leave this entry out."""


class DatasetSettings(
    DatasetDrawSettings,
    DatasetSizeSettings,
    DatasetCaptionSettings,
    DatasetLearningSettings,
    DatasetTableSettings,
    PictureSettings,
    EntrySettings,
):
    """One set of pictures: an entry of the datasets file."""

    dataset_type: Literal["image", "conditioning", "eval"] = setting("image")
    """What the dataset is for: image is trained on; eval is never trained on, but kept to measure
    by; conditioning, which conditioning_type implies, goes with the pictures of another."""

    instance_data_dir: Path | None = setting(None, path=True)
    """The folder with the pictures, searched with all folders in it; never written to."""

    cache_dir_vae: Path | None = setting(None, path=True)
    """The folder of this dataset's encoded pictures; without it, one named by its id in the
    folder of all encoded pictures."""

    vae_cache_ondemand: bool = setting(False)
    """Encode each picture when training first meets it, then keep it."""

    vae_cache_disable: bool = setting(False)
    """Encode each picture at every visit and keep nothing; random crops are drawn anew."""

    vae_batch_size: int = setting(4, ge=1, unit="pictures")
    """Pictures encoded at once."""

    write_batch_size: int = setting(128, ge=1, unit="entries")
    """Entries handed to the disk at once."""

    text_embeds: str | None = setting(None)
    """The id of the text_embeds entry that keeps this dataset's captions; without it, the default
    one."""

    image_embeds: str | None = setting(None)
    """The id of the image_embeds entry in whose folder this dataset's encoded pictures are kept,
    unless cache_dir_vae names one."""

    scan_for_errors: bool = setting(False)
    """Read every encoded picture when the run starts; one that is damaged is encoded again. What a
    changed picture or setting leaves behind is never used, with or without it."""

    dataset_name: str | None = setting(None, pending=True)
    """A dataset of the hub, as owner/name."""

    split: str = setting("train", pending=True)
    """The part of a hub dataset that is used."""

    revision: str | None = setting(None, pending=True)
    """The branch, tag or commit of a hub dataset."""

    image_column: str = setting("image", pending=True)
    """The column of a hub dataset that holds pictures."""

    huggingface: dict[str, Any] | None = setting(None, pending=True)
    """More of a hub dataset: its columns and filters."""

    aws_bucket_name: str | None = setting(None, pending=True)
    """The bucket of an S3 storage; its keys come from the environment."""

    aws_endpoint_url: str | None = setting(None, pending=True)
    """The address of an S3 storage."""

    aws_region_name: str | None = setting(None, pending=True)
    """The region of an S3 storage."""

    aws_data_prefix: str | None = setting(None, pending=True)
    """The folder inside the bucket."""

    @model_validator(mode="after")
    def _has_pictures(self) -> DatasetSettings:
        at_hand = self.type == "local"
        if "repeats" in self.model_fields_set and self.dataset_repeat is not None:
            raise ValueError("repeats and dataset_repeat say the same; keep one of the two")
        listed = self.role != "conditioning" and self.dataset_metadata_path is not None
        if at_hand and self.instance_data_dir is None and not listed:
            raise ValueError("instance_data_dir is missing: name the folder with the pictures")
        if self.role == "conditioning" and self.conditioning_type is None:
            raise ValueError(
                "conditioning_type is missing: say mask, controlnet, reference_strict or"
                " reference_loose"
            )
        if self.role == "conditioning" and self.type != "local":
            raise ValueError(f"type {self.type} is not for conditioning, which lies in a folder")
        if self.role == "conditioning" and self.table_path is not None:
            raise ValueError("a table is for pictures that are trained on, not for conditioning")
        return self

    @property
    def role(self) -> str:
        """The dataset_type; a conditioning_type makes it conditioning."""
        return "conditioning" if self.conditioning_type else self.dataset_type


class ImageEmbedsSettings(EntrySettings):
    """Where encoded pictures are kept: an image_embeds entry of the datasets file."""

    dataset_type: Literal["image_embeds"] = setting("image_embeds")
    """What the entry is for."""

    cache_dir: Path | None = setting(None, path=True)
    """The folder that holds a folder of encoded pictures for each dataset that names this entry;
    without it, the settings file's."""


class TextEmbedsSettings(EntrySettings):
    """Where encoded captions are kept: the text_embeds entry of the datasets file."""

    dataset_type: Literal["text_embeds"] = setting("text_embeds")
    """What the entry is for."""

    default: bool = setting(True)
    """This entry keeps the captions of every dataset that names no other."""

    cache_dir: Path | None = setting(None, path=True)
    """The folder of encoded captions; without it, the settings file's."""

    write_batch_size: int = setting(128, ge=1, unit="entries")
    """Entries handed to the disk at once."""

    text_encoder_batch_size: int = setting(1, ge=1, unit="captions")
    """Captions encoded at once."""

    skip_file_discovery: Nothing = setting("")
    """Start-up stages to leave out: none, for what is cached is never encoded twice."""

    text_cache_ondemand: bool = setting(False)
    """Encode each caption when training first meets it, then keep it; the text encoders stay
    loaded."""

    text_cache_disable: bool = setting(False)
    """Encode each caption at every visit and keep nothing; the text encoders stay loaded, and every
    step is slower."""

    caption_filter_list: Path | tuple[str, ...] | None = setting(None, path=True)
    """What is removed from captions: a list, a .json file of one, or a .txt file with an entry on
    each line. An entry is a regular expression, plain text being one, and what it finds is removed;
    s/search/replace/ replaces the first find instead, s/search/replace/g every one."""


@dataclass(frozen=True)
class Datasets:
    """The datasets file, disabled entries left out and inherited values filled in.

    Args:
        training: What is trained on.
        text_embeds: Where encoded captions are kept, those of prompts too.
        paired: The masks and the like of those that have some, by the id of the pictures.
        evaluation: What is never trained on.
        captions: Where captions are kept of those that name an entry of their own, by id.
        indexes: The name of the index that several resolutions share, by the id of each.
    """

    training: tuple[DatasetSettings, ...]
    text_embeds: TextEmbedsSettings
    paired: Mapping[str, tuple[DatasetSettings, ...]] = field(default_factory=dict)
    evaluation: tuple[DatasetSettings, ...] = ()
    captions: Mapping[str, TextEmbedsSettings] = field(default_factory=dict)
    indexes: Mapping[str, str] = field(default_factory=dict)

    @property
    def all(self) -> tuple[DatasetSettings, ...]:
        """All sets that are read: those of pictures, and what goes with them."""
        paired = {each.id: each for entries in self.paired.values() for each in entries}
        return (*self.pictures, *paired.values())

    @property
    def pictures(self) -> tuple[DatasetSettings, ...]:
        """All sets of pictures: those that are trained on, then those that are not."""
        return (*self.training, *self.evaluation)


INHERITED = frozenset(PictureSettings.model_fields)
"""The keys that a dataset takes from the settings file where its entry does not give them."""


def inherit(
    entry: DatasetSettings,
    data: DataSettings,
    *,
    vae_root: Path,
    vae_cache_ondemand: bool = False,
    vae_cache_disable: bool = False,
    vae_batch_size: int = 4,
    write_batch_size: int = 128,
    seed: int = 42,
) -> DatasetSettings:
    """`entry` with every value it does not give taken from the settings of the run.

    The two vae_cache switches are on where either place turns them on.

    Args:
        entry: As the datasets file gives it.
        data: What holds for every dataset.
        vae_root: The folder that holds one folder of encoded pictures for each dataset.
        vae_cache_ondemand: As the cache settings say.
        vae_cache_disable: As the cache settings say.
        vae_batch_size: As the cache settings say.
        write_batch_size: As the cache settings say.
        seed: Of the run.
    """
    wider: dict[str, Any] = {name: data.__dict__[name] for name in INHERITED}
    wider |= {
        "cache_dir_vae": vae_root / safe_name(entry.id),
        "vae_batch_size": vae_batch_size,
        "write_batch_size": write_batch_size,
        **table_defaults(entry, entry.type),
    }
    if not data.disable_bucket_pruning and "rare_buckets" not in data.model_fields_set:
        wider["rare_buckets"] = "drop"
    filled = {name: value for name, value in wider.items() if name not in entry.model_fields_set}
    filled["vae_cache_disable"] = entry.vae_cache_disable or vae_cache_disable
    filled["vae_cache_ondemand"] = entry.vae_cache_ondemand or vae_cache_ondemand
    shuffle = entry.caption_shuffle
    if shuffle is not None and shuffle.seed is None:
        filled["caption_shuffle"] = shuffle.model_copy(update={"seed": seed})
    filled["parquet"] = inherit_columns(entry.parquet, data)
    return entry.model_copy(update=filled)


def each_resolution(entry: DatasetSettings) -> tuple[DatasetSettings, ...]:
    """One dataset for each value of a list of resolutions, `entry` itself without a list.

    Their ids end in the value, as ``cats-512``, and so do the folders of their latents.
    """
    if isinstance(entry.resolution, float):
        return (entry,)
    return tuple(
        entry.model_copy(update={"resolution": value, **_named(entry, f"{value:.12g}")})
        for value in entry.resolution
    )


def _named(entry: DatasetSettings, name: str) -> dict[str, object]:
    folder = entry.cache_dir_vae
    return {"id": f"{entry.id}-{name}", "cache_dir_vae": folder / name if folder else None}


def inherit_text_embeds(
    entry: TextEmbedsSettings,
    *,
    text_root: Path,
    text_encoder_batch_size: int = 1,
    write_batch_size: int = 128,
    text_cache_ondemand: bool = False,
    text_cache_disable: bool = False,
) -> TextEmbedsSettings:
    """`entry` with every value it does not give taken from the cache settings of the run.

    The two text_cache switches are on where either place turns them on.
    """
    wider = {
        "cache_dir": text_root,
        "text_encoder_batch_size": text_encoder_batch_size,
        "write_batch_size": write_batch_size,
    }
    filled: dict[str, Any] = {k: v for k, v in wider.items() if k not in entry.model_fields_set}
    filled["text_cache_ondemand"] = entry.text_cache_ondemand or text_cache_ondemand
    filled["text_cache_disable"] = entry.text_cache_disable or text_cache_disable
    return entry.model_copy(update=filled)


def inherit_filters(entry: DatasetSettings, text_embeds: TextEmbedsSettings) -> DatasetSettings:
    """`entry` with the caption filters of `text_embeds`, unless it has its own."""
    if entry.caption_filter_list is not None:
        return entry
    return entry.model_copy(update={"caption_filter_list": text_embeds.caption_filter_list})


def contradictions(entry: DatasetSettings) -> Iterator[tuple[str, str]]:
    """What does not fit together in an entry with inherited values: a key, and what to do."""
    yield from caption_contradictions(entry)
    yield from size_contradictions(entry)
    yield from draw_contradictions(entry)
    yield from table_contradictions(entry, entry.type, entry.caption_strategy)
    yield from learning_contradictions(entry)
