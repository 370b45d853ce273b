"""How large pictures are trained and what is cut out of them: the size keys of the settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from simpletuner.core.section import Section, setting


def _one_spelling(value: object) -> object:
    if value == "face":
        raise ValueError(
            "face needs a face detector, and OpenCV no longer comes with one; set center, or cut"
            " the pictures yourself and set crop false"
        )
    return "center" if value == "centre" else value


def _some(values: tuple[float, ...]) -> tuple[float, ...]:
    if not values:
        raise ValueError("lists no size; name at least one")
    return values


Resolution = Annotated[float, Field(gt=0)]
Resolutions = Annotated[tuple[Resolution, ...], AfterValidator(_some)]
ResolutionType = Literal["pixel_area", "area", "pixel", "max_pixels"]
CropStyle = Annotated[Literal["random", "center", "corner"], BeforeValidator(_one_spelling)]


class SizeSettings(Section):
    """What may be said of sizes once for all datasets and again for each of them."""

    resolution: Resolution | Resolutions = setting(1024.0)
    """The size pictures are trained at, above 0 and in the unit of resolution_type; larger shows
    more detail and costs memory and time by the square. A list trains every picture at each of its
    sizes: the dataset stands for one of each, named ID-512, ID-768 and so on."""

    resolution_type: ResolutionType = setting("pixel_area")
    """The unit of sizes: pixel_area, the edge in px of a square with the same area; area,
    megapixels (1 is 1,000,000 px); pixel, the shorter edge in px; max_pixels, a number of pixels
    (1048576 is 1024 x 1024) that larger pictures are brought down to, while smaller ones keep
    their size."""

    minimum_image_size: float | None = setting(None, ge=0)
    """Smaller pictures are left out; in the unit of resolution_type, 0 for no limit."""

    maximum_image_size: float | None = setting(None, ge=0)
    """Larger pictures are brought down to target_downsample_size before a crop; in the unit of
    resolution_type, 0 for no limit."""

    target_downsample_size: float | None = setting(None, ge=0)
    """What pictures above maximum_image_size are brought down to before a crop, in the unit of
    resolution_type; larger makes a crop show less of the picture."""

    max_upscale_threshold: float | None = setting(None, ge=0, le=1)
    """Pictures that would have to be enlarged by more than this share of their edges are left
    out; 0 leaves out every picture smaller than its bucket."""

    aspect_bucket_alignment: int = setting(64, ge=8, le=256, multiple_of=8, unit="px")
    """The edges of every bucket are multiples of this; smaller trims less off the pictures and
    makes more buckets."""

    aspect_bucket_rounding: int = setting(2, ge=1, le=9, unit="decimals")
    """How finely aspect ratios are told apart; more decimals make more buckets. Under
    resolution_type max_pixels they are not rounded."""

    rare_buckets: Literal["keep", "merge", "drop"] = setting("keep")
    """What happens to a bucket with fewer pictures than a batch: keep trains on them in a smaller
    batch; merge crops them to the nearest fuller bucket, if one is within 10 % of their shape and
    area, and keeps them otherwise; drop leaves them out."""


class DatasetSizeSettings(SizeSettings):
    """What is said of sizes for one dataset."""

    crop: bool = setting(False)
    """Cut pictures to crop_aspect; false keeps their shape and trims only what
    aspect_bucket_alignment leaves over."""

    crop_aspect: Literal["square", "preserve", "closest", "random"] = setting("square")
    """The shape that is cut out: square; preserve, the picture's own; closest, the nearest of
    crop_aspect_buckets; random, one of them, drawn for each picture and the same in every run."""

    crop_style: CropStyle = setting("random")
    """Where it is cut out: at random, in the center, or from the top left corner."""

    minimum_aspect_ratio: float | None = setting(None, gt=0)
    """Pictures with less width to their height are left out."""

    maximum_aspect_ratio: float | None = setting(None, gt=0)
    """Pictures with more width to their height are left out."""

    crop_aspect_buckets: tuple[float | dict[str, float], ...] | None = setting(None)
    """The shapes that crop_aspect closest and random choose from: numbers, width over height, or
    for random also objects such as {"aspect": 1.5, "weight": 2}, where twice the weight is drawn
    twice as often."""


def shapes_of(entry: DatasetSizeSettings) -> list[tuple[float, float]]:
    """Ratio and weight of each of `crop_aspect_buckets`, the narrowest first."""
    return sorted(
        (item["aspect"], item.get("weight", 1.0)) if isinstance(item, dict) else (item, 1.0)
        for item in entry.crop_aspect_buckets or ()
    )


def size_contradictions(entry: DatasetSizeSettings) -> Iterator[tuple[str, str]]:
    """What does not fit together in an entry with inherited values: a key, and what to do."""
    if entry.maximum_image_size and not entry.target_downsample_size:
        yield "maximum_image_size", "needs target_downsample_size: what larger pictures become"
    least, most = entry.minimum_aspect_ratio, entry.maximum_aspect_ratio
    if least is not None and most is not None and least > most:
        yield "minimum_aspect_ratio", f"is above maximum_aspect_ratio ({most:g}); no picture fits"
    yield from _wrong_shapes(entry)
    for key in ("resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size"):
        if sentence := _wrong_unit(entry.__dict__[key], entry.resolution_type):
            yield key, sentence


def _wrong_shapes(entry: DatasetSizeSettings) -> Iterator[tuple[str, str]]:
    aspect, listed = entry.crop_aspect, entry.crop_aspect_buckets or ()
    if aspect in ("closest", "random"):
        if not listed:
            example = "shapes to choose from, width over height, such as [0.75, 1, 1.5]"
            yield "crop_aspect", f"{aspect} needs crop_aspect_buckets: {example}"
        if not entry.crop:
            yield "crop_aspect", f"{aspect} needs crop true; without it pictures keep their shape"
    elif listed:
        fix = "set one of them, or remove the list"
        yield "crop_aspect_buckets", f"is for crop_aspect closest and random, not {aspect}; {fix}"
    for item in listed:
        if not _is_shape(item):
            takes = (
                f"numbers above 0, width over height, from 1/{_NARROWEST} to {_NARROWEST}, or"
                ' objects like {"aspect": 1.5}'
            )
            yield "crop_aspect_buckets", f"takes {takes}, got {item}"
        elif isinstance(item, dict) and "weight" in item and aspect == "closest":
            yield "crop_aspect_buckets", "weight is for crop_aspect random; closest takes none"


def _is_shape(item: float | dict[str, float]) -> bool:
    if isinstance(item, dict):
        right = {"aspect"} <= item.keys() <= {"aspect", "weight"} and min(item.values()) > 0
        return right and _is_shape(item["aspect"])
    return 1 / _NARROWEST <= item <= _NARROWEST


_NARROWEST = 16
"""The longer edge over the shorter; beyond it a bucket is a line that fills the memory."""


_FEWEST_PX, _MOST_PX = 8, 16384
_FEWEST_PIXELS, _MOST_PIXELS = 64 * 64, _MOST_PX**2
_MOST_MEGAPIXELS = 32


def _wrong_unit(value: float | None, unit: str) -> str | None:
    if not value:
        return None
    if unit == "area" and value >= _MOST_MEGAPIXELS:
        return f"counts megapixels under resolution_type area, got {value:g}; pixel_area counts px"
    if unit == "max_pixels" and value < _FEWEST_PIXELS:
        return (
            f"counts all pixels of a picture under resolution_type max_pixels, got {value:g};"
            " a square of 1024 px has 1048576"
        )
    if unit == "max_pixels" and value > _MOST_PIXELS:
        return f"is at most {_MOST_PIXELS}, the pixels of {_MOST_PX} x {_MOST_PX}, got {value:.12g}"
    if unit in ("pixel", "pixel_area") and value > _MOST_PX:
        return (
            f"counts px of an edge under resolution_type {unit}, at most {_MOST_PX},"
            f" got {value:.12g}; max_pixels counts pixels"
        )
    if unit != "area" and value < _FEWEST_PX:
        return f"counts px under resolution_type {unit}, got {value:g}; area counts megapixels"
    return None
