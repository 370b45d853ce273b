"""From a dataset's settings to the rules its captions, sizes and filters follow."""

from __future__ import annotations

from PIL import ImageColor

from simpletuner.data.captions import CAPTION_STRATEGIES, CaptionRule, clean
from simpletuner.data.geometry import GeometryRule, Measure, SizeFilter
from simpletuner.data.settings import DatasetSettings


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
    )


def geometry_rule(settings: DatasetSettings) -> GeometryRule:
    """How the pictures of a dataset become the sizes the encoder sees."""
    return GeometryRule(
        resolution=settings.resolution,
        measure=Measure(settings.resolution_type),
        alignment=settings.aspect_bucket_alignment,
        rounding=settings.aspect_bucket_rounding,
        crop=settings.crop,
        square=settings.crop_aspect == "square",
        style=settings.crop_style,
        maximum=settings.maximum_image_size or None,
        downsample=settings.target_downsample_size or None,
    )


def size_filter(settings: DatasetSettings) -> SizeFilter:
    """Which pictures of a dataset the user does not want."""
    return SizeFilter(
        measure=Measure(settings.resolution_type),
        minimum=settings.minimum_image_size or None,
        square=settings.crop and settings.crop_aspect == "square",
        least_ratio=settings.minimum_aspect_ratio,
        most_ratio=settings.maximum_aspect_ratio,
    )


def background(settings: DatasetSettings) -> tuple[int, int, int]:
    """The colour under transparent pictures."""
    red, green, blue = ImageColor.getrgb(settings.image_background)[:3]
    return red, green, blue
