"""From a file's bytes to what the encoder sees: upright, sRGB, opaque, resized once, cropped.

Letters: H W height and width of the crop.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from simpletuner.core.errors import DataError
from simpletuner.core.types import Geometry
from simpletuner.data.probe import UNREADABLE, orientation_of

Colour = tuple[int, int, int]

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture upright, by its EXIF orientation."""

PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
"""Pillow's mode for the colour space a profile says it describes."""


class PictureError(DataError):
    """One picture cannot be decoded.

    Args:
        reason: Why, without its name.
        where: Its dataset and path.
    """

    def __init__(self, reason: str, where: str = "the picture") -> None:
        super().__init__(f"{where} {reason}")
        self.reason = reason


def decode(data: bytes, background: Colour) -> Image.Image:
    """The picture in `data`: upright, in sRGB, alpha flattened on `background`; mode RGB.

    Raises:
        PictureError: It cannot be decoded.
    """
    return _upright(data, lambda image: _flatten(image, background))


def opacity(data: bytes) -> Image.Image:
    """The alpha of the picture in `data`, upright; mode L, 255 throughout where it has none.

    Raises:
        PictureError: It cannot be decoded.
    """
    return _upright(data, lambda image: _split_alpha(image)[1] or Image.new("L", image.size, 255))


def _upright(data: bytes, take: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with Image.open(BytesIO(data)) as image:
            orientation = orientation_of(image)
            image.load()
            taken = take(image)
    except UNREADABLE as error:
        raise PictureError(f"cannot be decoded: {error}") from error
    return taken.transpose(TURNS[orientation]) if orientation in TURNS else taken


def render(image: Image.Image, geometry: Geometry) -> NDArray[np.uint8]:
    """Resize once, anti-aliased, then crop, then flip.

    Args:
        image: Mode RGB.
        geometry: Decided for a picture of this size.

    Returns:
        [H, W, 3] uint8.

    Raises:
        PictureError: The picture has another size.
    """
    if image.size != geometry.source:
        raise PictureError(f"is {image.size} px, its header said {geometry.source}")
    return _cut(image, geometry, Image.Resampling.LANCZOS)


def render_beside(image: Image.Image, geometry: Geometry) -> NDArray[np.uint8]:
    """What `render` does to a picture, done to one of its shape that may have another size.

    Args:
        image: Mode RGB.
        geometry: That of the picture.

    Returns:
        [H, W, 3] uint8.
    """
    if image.size != geometry.source:
        image = image.resize(geometry.source, Image.Resampling.LANCZOS)
    return render(image, geometry)


def render_mask(mask: Image.Image, geometry: Geometry) -> NDArray[np.uint8]:
    """What `render` does to a picture, done to its mask, which may have another size.

    Args:
        mask: Mode L.
        geometry: That of the picture.

    Returns:
        [H, W] uint8.
    """
    # Lanczos would ring: grey beside every edge of the mask.
    if mask.size != geometry.source:
        mask = mask.resize(geometry.source, Image.Resampling.BILINEAR)
    return _cut(mask, geometry, Image.Resampling.BILINEAR)


def _cut(image: Image.Image, geometry: Geometry, how: Image.Resampling) -> NDArray[np.uint8]:
    left, top, width, height = geometry.crop
    if image.size != geometry.resize:
        image = image.resize(geometry.resize, how)
    image = image.crop((left, top, left + width, top + height))
    if geometry.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)


def _flatten(image: Image.Image, background: Colour) -> Image.Image:
    colours, alpha = _split_alpha(image)
    colours = _to_srgb(colours, image.info.get("icc_profile"))
    if alpha is None:
        return colours
    flat = Image.new("RGB", colours.size, background)
    flat.paste(colours, mask=alpha)
    return flat


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours without alpha, in 8 bits, and the alpha as L if there is any."""
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 or cuts the low byte off, depending on the mode.
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)), None
    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode in ("P", "YCbCr", "HSV") else image, None
    grey = image.mode in ("L", "LA", "La")
    alpha = image.convert("RGBA").getchannel("A")
    return image.convert("RGBA").convert("RGB").convert("L" if grey else "RGB"), alpha


def _to_srgb(colours: Image.Image, profile: bytes | None) -> Image.Image:
    """Mode RGB by the embedded profile, perceptual intent.

    A profile that is damaged or describes another kind of picture is passed over, as in browsers.
    """
    source = _profile(profile) if profile else None
    if source is None and colours.mode == "LAB":
        source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    if source is None:
        return colours.convert("RGB")
    mode = PROFILE_MODES.get(source.profile.xcolor_space.strip(), "")
    if mode == "RGB" and colours.mode in ("1", "L"):
        colours = colours.convert("RGB")
    if mode == "L" and colours.mode == "1":
        colours = colours.convert("L")
    if mode != colours.mode:
        return colours.convert("RGB")
    try:
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            colours.mode,
            "RGB",
            renderingIntent=ImageCms.Intent.PERCEPTUAL,
        )
    except ImageCms.PyCMSError:
        return colours.convert("RGB")
    if mode == "RGB" and _moves_nothing(transform):
        return colours
    converted = ImageCms.applyTransform(colours, transform)
    assert converted is not None
    return converted


def _moves_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """True if the profile is sRGB but for rounding, as most are; the pixels can stay."""
    levels = np.linspace(0, 255, 16).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    moved = ImageCms.applyTransform(Image.fromarray(grid), transform)
    return int(np.abs(np.asarray(moved).astype(np.int16) - grid).max()) <= 1


def _profile(data: bytes) -> ImageCms.ImageCmsProfile | None:
    try:
        return ImageCms.ImageCmsProfile(BytesIO(data))
    except OSError:
        return None
