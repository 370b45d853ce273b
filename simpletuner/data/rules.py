"""From a dataset's settings to the rules its captions, sizes and filters follow."""

from __future__ import annotations

import math

import pyarrow as pa
import pyarrow.compute as pc
from PIL import ImageColor

from simpletuner.data.caption_edits import PLACEHOLDER, CaptionFilter, TagShuffle, Trigger
from simpletuner.data.captions import CAPTION_STRATEGIES, CaptionRule, clean
from simpletuner.data.geometry import SQUARE, GeometryRule, Measure, Shapes, SizeFilter
from simpletuner.data.metadata import TableRule
from simpletuner.data.settings import DatasetSettings
from simpletuner.data.size_settings import shapes_of
from simpletuner.data.sizing import Sizing


def caption_rule(settings: DatasetSettings) -> CaptionRule:
    """How the captions of a dataset are made."""
    prompt = settings.instance_prompt
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt or ())
    name = "instanceprompt" if settings.only_instance_prompt else settings.caption_strategy
    strategy = CAPTION_STRATEGIES[name]
    return CaptionRule(
        strategy,
        tuple(clean(prompt) for prompt in prompts),
        prepend=settings.prepend_instance_prompt and not strategy.fact("is_prompt", False),
        multiline=not settings.disable_multiline_split,
        default=None if settings.default_caption is None else clean(settings.default_caption),
        filters=tuple(map(CaptionFilter.of, _filter_list(settings))),
        shuffle=_shuffle(settings),
        prefix=clean(settings.caption_prefix),
        suffix=clean(settings.caption_suffix),
        trigger=_trigger(settings),
    )


def _filter_list(settings: DatasetSettings) -> tuple[str, ...]:
    found = settings.caption_filter_list or ()
    assert isinstance(found, tuple), "a file is read with the settings"
    return found


def _shuffle(settings: DatasetSettings) -> TagShuffle | None:
    given = settings.caption_shuffle
    if given is None or not given.enable:
        return None
    return TagShuffle(
        count=given.count,
        seed=given.seed or 0,
        split_on=given.split_on,
        keep=given.position_start,
        original=given.include_original,
    )


def _trigger(settings: DatasetSettings) -> Trigger | None:
    """A regularisation set shows what is not to be learned: the word is not put before it."""
    if not settings.trigger_word:
        return None
    prepend = settings.prepend_trigger_word and not settings.is_regularisation_data
    return Trigger(clean(settings.trigger_word), prepend)


def trigger_is_nowhere(settings: DatasetSettings, texts: pa.ChunkedArray) -> bool:
    """True if there is a trigger word that no caption has, and none says where it stands.

    Args:
        settings: Of the dataset.
        texts: [n] what its captions are made of, for captions by file name the paths.
    """
    word, rule = settings.trigger_word, caption_rule(settings)
    if not word or settings.prepend_trigger_word or settings.is_regularisation_data:
        return False
    said = [rule.prefix, rule.suffix, *rule.prompts * (rule.prepend or rule.prompts_alone)]
    said += [rule.default] if rule.default and rule.has_texts else []
    words = (PLACEHOLDER, word, word.replace(" ", "_"))
    if any(each in text for each in words for text in said):
        return False
    if rule.prompts_alone:
        return True
    return not any(pc.any(pc.match_substring(texts, each)).as_py() for each in words)


def table_rule(settings: DatasetSettings) -> TableRule | None:
    """What is read of a dataset's table; None for a dataset without one."""
    reads = caption_rule(settings).reads_table
    block = settings.parquet
    if settings.csv_file is not None:
        return TableRule(
            settings.csv_file,
            (settings.csv_url_column,),
            _listed(settings.csv_caption_column or ()) if reads else (),
            files_key="csv_url_column",
            captions_key="csv_caption_column",
        )
    if settings.dataset_metadata_path is not None:
        return TableRule(
            settings.dataset_metadata_path,
            settings.data_file_keys,
            _listed(settings.caption_column) if reads else (),
        )
    if block is not None:
        return TableRule(
            block.path,
            (block.filename_column,),
            _listed(block.caption_column) if reads else (),
            block.fallback_caption_column if reads else None,
            width=block.width_column,
            height=block.height_column,
            endings=block.identifier_includes_extension,
            anywhere=True,
            files_key="filename_column",
        )
    return None


def _listed(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def geometry_rule(settings: DatasetSettings) -> GeometryRule:
    """How the pictures of a dataset become the sizes the encoder sees."""
    assert isinstance(settings.resolution, float), "a list was taken apart with the settings"
    return GeometryRule(
        resolution=settings.resolution,
        measure=Measure(settings.resolution_type),
        alignment=settings.aspect_bucket_alignment,
        rounding=settings.aspect_bucket_rounding,
        crop=settings.crop,
        shapes=_shapes(settings),
        style=settings.crop_style,
        maximum=settings.maximum_image_size or None,
        downsample=settings.target_downsample_size or None,
        most_enlarged=settings.max_upscale_threshold,
    )


def _shapes(settings: DatasetSettings) -> Shapes | None:
    if settings.crop_aspect == "square":
        return SQUARE
    if settings.crop_aspect == "preserve":
        return None
    ratios, weights = zip(*shapes_of(settings), strict=True)
    return Shapes(ratios, weights if settings.crop_aspect == "random" else ())


def size_filter(settings: DatasetSettings) -> SizeFilter:
    """Which pictures of a dataset the user does not want."""
    return SizeFilter(
        measure=Measure(settings.resolution_type),
        minimum=settings.minimum_image_size or None,
        square=settings.crop and settings.crop_aspect == "square",
        least_ratio=settings.minimum_aspect_ratio,
        most_ratio=settings.maximum_aspect_ratio,
        most_enlarged=settings.max_upscale_threshold,
    )


def sizing(settings: DatasetSettings, train_batch_size: int) -> Sizing:
    """How the pictures of a dataset are put into buckets.

    Args:
        settings: Of the dataset.
        train_batch_size: Of the run, for a dataset that does not say.
    """
    grown = settings.max_upscale_threshold
    if grown is None:
        grown = 0.0 if settings.resolution_type == "max_pixels" else math.inf
    batch = settings.train_batch_size or train_batch_size
    return Sizing(
        id=settings.id,
        rule=geometry_rule(settings),
        wanted=size_filter(settings),
        most=settings.max_num_samples,
        rare=settings.rare_buckets,
        fewest=-(-batch // (settings.repeats + 1)),
        most_enlarged=grown,
    )


def background(settings: DatasetSettings) -> tuple[int, int, int]:
    """The colour under transparent pictures."""
    red, green, blue = ImageColor.getrgb(settings.image_background)[:3]
    return red, green, blue
