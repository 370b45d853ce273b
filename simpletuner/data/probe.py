"""What a picture's header tells: oriented size, alpha, frames; no pixel is decoded."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from io import BytesIO

from PIL import ExifTags, Image, UnidentifiedImageError

UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's readers raise on files that are damaged or not pictures."""

WITH_ALPHA = frozenset(("RGBA", "RGBa", "LA", "La", "PA"))

NO_STATED_WHITE = frozenset(("I", "F"))
"""Modes of 32 bits a value, which do not say what value is white."""


@dataclass(frozen=True)
class Probe:
    """A picture as it is meant to be seen.

    Args:
        width: After its orientation, in px.
        height: The same.
        alpha: It may be transparent.
        frames: It has several frames or pages, of which the first is seen.
    """

    width: int
    height: int
    alpha: bool = False
    frames: bool = False


def probe(data: bytes) -> Probe | str:
    """What the header of `data` tells, or the reason why it cannot be used."""
    try:
        with Image.open(BytesIO(data)) as image:
            width, height = image.size
            mode = image.mode
            turned = orientation_of(image) >= 5
            alpha = mode in WITH_ALPHA or "transparency" in image.info
            frames = _has_frames(image)
    except Image.DecompressionBombError:
        return "larger than 178 megapixels"
    except UnidentifiedImageError:
        return "not a picture" if data else "the file is empty"
    except UNREADABLE as error:
        return f"damaged header: {error}"
    if mode in NO_STATED_WHITE:
        return f"mode {mode} (32 bits a value) does not say what is white; save it with 8 or 16"
    if min(width, height) < 1:
        return "no pixels"
    if turned:
        width, height = height, width
    return Probe(width, height, alpha, frames)


def _has_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except UNREADABLE:  # a damaged second frame says nothing of the first
        return True


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, still to be applied to a picture that was opened, not loaded.

    Only what stands before the pixels counts, so that the answer is the same before and after
    decoding: for PNG, Pillow's own `getexif` decodes the picture to look behind them. TIFF is
    turned by Pillow itself on loading. Damaged EXIF counts as none, as it does in viewers.
    """
    if image.format == "TIFF":
        return 1
    try:
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except UNREADABLE:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1
