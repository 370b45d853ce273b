"""What a run trains on: what holds for every dataset, and the entries of the datasets file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from simpletuner.core.files import safe_name
from simpletuner.core.section import Section, setting
from simpletuner.data.captions import CAPTION_STRATEGIES

ResolutionType = Literal["pixel_area", "area", "pixel"]


_OTHER_SPELLINGS = MappingProxyType(
    {"instance_prompt": "instanceprompt", "centre": "center", "json": "discovery"}
)


def _one_spelling(value: object) -> object:
    return _OTHER_SPELLINGS.get(value, value) if isinstance(value, str) else value


CaptionStrategy = Annotated[str, BeforeValidator(_one_spelling)]
CropStyle = Annotated[Literal["random", "center", "corner", "face"], BeforeValidator(_one_spelling)]
MetadataBackend = Annotated[
    Literal["discovery", "parquet", "huggingface", "webshart"], BeforeValidator(_one_spelling)
]
Storage = Literal["local", "aws", "csv", "huggingface", "webshart"]
DatasetId = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f]+$")]


class PictureSettings(Section):
    """What may be said once for all datasets and again for each of them."""

    resolution: float = setting(1024.0, gt=0)
    """The size pictures are trained at, in the unit of resolution_type; larger shows more detail
    and costs memory and time by the square."""

    resolution_type: ResolutionType = setting("pixel_area")
    """The unit of sizes: pixel_area, the edge in px of a square with the same area; area,
    megapixels (1 is 1,000,000 px); pixel, the shorter edge in px."""

    minimum_image_size: float | None = setting(None, ge=0)
    """Smaller pictures are left out; in the unit of resolution_type, 0 for no limit."""

    maximum_image_size: float | None = setting(None, ge=0)
    """Larger pictures are brought down to target_downsample_size before a crop; in the unit of
    resolution_type, 0 for no limit."""

    target_downsample_size: float | None = setting(None, ge=0)
    """What pictures above maximum_image_size are brought down to before a crop, in the unit of
    resolution_type; larger makes a crop show less of the picture."""

    max_upscale_threshold: float | None = setting(None, pending=True, ge=0, le=1)
    """Pictures that would have to be enlarged by more than this share are left out."""

    aspect_bucket_alignment: int = setting(64, ge=8, le=256, multiple_of=8, unit="px")
    """The edges of every bucket are multiples of this; smaller trims less off the pictures and
    makes more buckets."""

    aspect_bucket_rounding: int = setting(2, ge=1, le=9, unit="decimals")
    """How finely aspect ratios are told apart; more decimals make more buckets."""

    image_background: str = setting("#ffffff", pattern=r"^#[0-9a-fA-F]{6}$")
    """The colour that shows through transparent pictures, as #rrggbb."""

    caption_strategy: CaptionStrategy = setting("filename", table=CAPTION_STRATEGIES)
    """Where captions come from."""

    instance_prompt: str | tuple[str, ...] | None = setting(None)
    """The caption of every picture under the strategy instanceprompt, or what is put before each
    caption; of a list, each picture draws one at every visit."""

    prepend_instance_prompt: bool = setting(False)
    """Put instance_prompt and a blank before every caption."""

    only_instance_prompt: bool = setting(False)
    """Use instance_prompt alone as the caption, whatever the strategy is."""

    caption_dropout_probability: float = setting(0.1, ge=0, le=1)
    """The share of visits at which the caption is empty, so that guidance has something to push
    away from; larger follows prompts less."""

    skip_file_discovery: str = setting("", pending=True)
    """Start-up stages that are not repeated (vae, aspect, metadata, text), with commas between;
    unchanged files are never read twice anyway."""

    allow_excluded: bool = setting(False)
    """Train although more than 5 % of a dataset (and more than two pictures) is left out."""

    max_workers: int = setting(32, ge=1, unit="threads")
    """Most threads that read and decode pictures; more than the processor has cores are not
    started."""


class DataSettings(PictureSettings):
    """What holds for every dataset that does not say otherwise."""

    data_backend_config: Path | None = setting(None, path=True)
    """The file that lists the datasets; without it, multidatabackend.json beside the settings
    file, in config/, or in output_dir."""

    parquet_caption_column: str | None = setting(None, pending=True)
    """The column of a Parquet table that holds captions."""

    parquet_filename_column: str | None = setting(None, pending=True)
    """The column of a Parquet table that holds file names."""

    data_backend_sampling: Literal["auto-weighting", "uniform", "mix"] = setting(
        "auto-weighting", pending=("uniform", "mix")
    )
    """How several datasets are mixed: auto-weighting in proportion to their sizes, so that an
    epoch sees everything; uniform in equal shares; mix by each one's probability."""

    disable_bucket_pruning: bool = setting(True, pending=True)
    """Keep buckets that hold fewer pictures than a batch; false would leave them out."""

    allow_dataset_oversubscription: bool = setting(False, pending=True)
    """Raise the repeats of datasets that are smaller than a batch; they train without it, in
    smaller batches."""

    masked_loss_probability: float = setting(1.0, pending=True, ge=0, le=1)
    """The share of visits at which a picture's mask is applied to its loss."""

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

    type: Storage = setting("local", pending=("aws", "csv", "huggingface", "webshart"))
    """Where the files lie: local is a folder of this machine."""

    disabled: bool = setting(False)
    """Leave this entry out."""


class DatasetSettings(PictureSettings, EntrySettings):
    """One set of pictures: an entry of the datasets file."""

    dataset_type: Literal["image", "conditioning", "eval", "image_embeds"] = setting(
        "image", pending=("conditioning", "eval", "image_embeds")
    )
    """What the dataset is for: image is trained on."""

    instance_data_dir: Path | None = setting(None, path=True)
    """The folder with the pictures, searched with all folders in it; never written to."""

    cache_dir_vae: Path | None = setting(None, path=True)
    """The folder of this dataset's encoded pictures; without it, one named by its id in the
    folder of all encoded pictures."""

    metadata_backend: MetadataBackend = setting(
        "discovery", pending=("parquet", "huggingface", "webshart")
    )
    """Where the sizes of pictures come from: discovery reads the head of each file."""

    repeats: int = setting(0, ge=0)
    """How often each picture is seen again within an epoch; 0 is once."""

    probability: float = setting(1.0, ge=0)
    """How often this dataset is drawn from, beside the others; larger is more often."""

    crop: bool = setting(False)
    """Cut pictures to crop_aspect; false keeps their shape and trims only what
    aspect_bucket_alignment leaves over."""

    crop_aspect: Literal["square", "preserve", "closest", "random"] = setting(
        "square", pending=("closest", "random")
    )
    """The shape that is cut out: square, or preserve for the picture's own."""

    crop_style: CropStyle = setting("random", pending=("face",))
    """Where it is cut out: at random, in the center, or from the top left corner."""

    minimum_aspect_ratio: float | None = setting(None, gt=0)
    """Pictures with less width to their height are left out."""

    maximum_aspect_ratio: float | None = setting(None, gt=0)
    """Pictures with more width to their height are left out."""

    disable_multiline_split: bool = setting(False)
    """Take a text file as one caption, where otherwise each line is one and each visit draws one
    of them."""

    vae_cache_ondemand: bool = setting(False)
    """Encode each picture when training first meets it, then keep it."""

    vae_cache_disable: bool = setting(False)
    """Encode each picture at every visit and keep nothing; random crops are drawn anew."""

    vae_batch_size: int = setting(4, ge=1, unit="pictures")
    """Pictures encoded at once."""

    write_batch_size: int = setting(128, ge=1, unit="entries")
    """Entries handed to the disk at once."""

    text_embeds: str | None = setting(None, pending=True)
    """The id of the text_embeds entry that keeps this dataset's captions."""

    image_embeds: str | None = setting(None, pending=True)
    """The id of the image_embeds entry that keeps this dataset's encoded pictures."""

    max_num_samples: int | None = setting(None, pending=True, ge=1, unit="pictures")
    """Train on this many pictures only, always the same ones."""

    train_batch_size: int | None = setting(None, pending=True, ge=1, unit="pictures")
    """This dataset's own batch size."""

    start_epoch: int = setting(1, pending=True, ge=1, unit="epochs")
    """The epoch in which this dataset is first seen."""

    end_epoch: int | None = setting(None, pending=True, ge=0, unit="epochs")
    """The epoch in which this dataset is last seen; 0 for no end."""

    start_step: int = setting(1, pending=True, ge=0, unit="optimizer steps")
    """The step in which this dataset is first seen."""

    end_step: int | None = setting(None, pending=True, ge=0, unit="optimizer steps")
    """The step in which this dataset is last seen; 0 for no end."""

    is_regularisation_data: bool = setting(False, pending=True)
    """Train towards what the untouched base model says of these pictures, to keep what it knew."""

    crop_aspect_buckets: tuple[Any, ...] | None = setting(None, pending=True)
    """The shapes that crop_aspect closest and random choose from: numbers, width over height."""

    caption_shuffle: dict[str, Any] | None = setting(None, pending=True)
    """How the tags of a caption are shuffled."""

    parquet: dict[str, Any] | None = setting(None, pending=True)
    """A table with captions and sizes: its path and its columns."""

    conditioning_type: (
        Literal["controlnet", "mask", "segmentation", "reference_strict", "reference_loose"] | None
    ) = setting(None, pending=True)
    """What the pictures of a conditioning dataset are to those they belong to."""

    conditioning_data: str | tuple[str, ...] | None = setting(None, pending=True)
    """The conditioning datasets that belong to this one, by id."""

    conditioning: dict[str, Any] | tuple[dict[str, Any], ...] | None = setting(None, pending=True)
    """Conditioning pictures to be made from this dataset, such as edges or masks."""

    source_dataset_id: str | None = setting(None, pending=True)
    """The dataset that a conditioning dataset belongs to."""

    scan_for_errors: bool = setting(False, pending=True)
    """Compare the cache with the pictures before the run begins."""

    vae_cache_clear_each_epoch: bool = setting(False, pending=True)
    """Encode everything anew in each epoch."""

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

    csv_file: Path | None = setting(None, pending=True, path=True)
    """A table of addresses and captions."""

    csv_url_column: str = setting("url", pending=True)
    """Its column of addresses."""

    csv_caption_column: str | None = setting(None, pending=True)
    """Its column of captions."""

    csv_cache_dir: Path | None = setting(None, pending=True, path=True)
    """The folder that downloads are kept in."""

    @model_validator(mode="after")
    def _has_pictures(self) -> DatasetSettings:
        if (self.type, self.dataset_type) == ("local", "image") and self.instance_data_dir is None:
            raise ValueError("instance_data_dir is missing: name the folder with the pictures")
        return self


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

    skip_file_discovery: str = setting("", pending=True)
    """Start-up stages that are not repeated; what is cached is never encoded twice anyway."""

    text_cache_ondemand: bool = setting(False, pending=True)
    """Encode each caption when training first meets it."""

    text_cache_disable: bool = setting(False, pending=True)
    """Encode each caption at every visit and keep nothing."""

    caption_filter_list: Path | tuple[str, ...] | None = setting(None, pending=True, path=True)
    """What is removed from captions: a list, or a file with one entry on each line."""


@dataclass(frozen=True)
class Datasets:
    """The datasets file, disabled entries left out and inherited values filled in.

    Args:
        training: What is trained on.
        text_embeds: Where encoded captions are kept.
    """

    training: tuple[DatasetSettings, ...]
    text_embeds: TextEmbedsSettings


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
    """
    wider: dict[str, Any] = {name: data.__dict__[name] for name in INHERITED}
    wider |= {
        "cache_dir_vae": vae_root / safe_name(entry.id),
        "vae_batch_size": vae_batch_size,
        "write_batch_size": write_batch_size,
    }
    filled = {name: value for name, value in wider.items() if name not in entry.model_fields_set}
    filled["vae_cache_disable"] = entry.vae_cache_disable or vae_cache_disable
    filled["vae_cache_ondemand"] = entry.vae_cache_ondemand or vae_cache_ondemand
    return entry.model_copy(update=filled)


def inherit_text_embeds(
    entry: TextEmbedsSettings,
    *,
    text_root: Path,
    text_encoder_batch_size: int = 1,
    write_batch_size: int = 128,
) -> TextEmbedsSettings:
    """`entry` with every value it does not give taken from the cache settings of the run."""
    wider = {
        "cache_dir": text_root,
        "text_encoder_batch_size": text_encoder_batch_size,
        "write_batch_size": write_batch_size,
    }
    given = entry.model_fields_set
    return entry.model_copy(update={k: v for k, v in wider.items() if k not in given})


def contradictions(entry: DatasetSettings) -> Iterator[tuple[str, str]]:
    """What does not fit together in an entry with inherited values: a key, and what to do."""
    if entry.maximum_image_size and not entry.target_downsample_size:
        yield "maximum_image_size", "needs target_downsample_size: what larger pictures become"
    least, most = entry.minimum_aspect_ratio, entry.maximum_aspect_ratio
    if least is not None and most is not None and least > most:
        yield "minimum_aspect_ratio", f"is above maximum_aspect_ratio ({most:g}); no picture fits"
    wants = [
        key
        for key, wanted in (
            ("caption_strategy", entry.caption_strategy == "instanceprompt"),
            ("prepend_instance_prompt", entry.prepend_instance_prompt),
            ("only_instance_prompt", entry.only_instance_prompt),
        )
        if wanted
    ]
    if wants and not entry.instance_prompt:
        yield wants[0], "needs instance_prompt: the text to use"
    for key in ("resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size"):
        if sentence := _wrong_unit(entry.__dict__[key], entry.resolution_type):
            yield key, sentence


_MOST_MEGAPIXELS, _FEWEST_PX = 32, 8


def _wrong_unit(value: float | None, unit: str) -> str | None:
    if not value:
        return None
    if unit == "area" and value >= _MOST_MEGAPIXELS:
        return f"counts megapixels under resolution_type area, got {value:g}; pixel_area counts px"
    if unit != "area" and value < _FEWEST_PX:
        return f"counts px under resolution_type {unit}, got {value:g}; area counts megapixels"
    return None
