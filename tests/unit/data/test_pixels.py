from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from simpletuner.core.types import Geometry
from simpletuner.data.pixels import PictureError, decode, render
from simpletuner.data.probe import Probe, probe

WHITE = (255, 255, 255)

# What a camera stores for each orientation, from the upright picture.
STORED: dict[int, Any] = {
    1: lambda up: up,
    2: lambda up: up[:, ::-1],
    3: lambda up: up[::-1, ::-1],
    4: lambda up: up[::-1],
    5: lambda up: up.swapaxes(0, 1),
    6: lambda up: np.rot90(up, 1),
    7: lambda up: up[::-1, ::-1].swapaxes(0, 1),
    8: lambda up: np.rot90(up, -1),
}


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)


def packed(image: Image.Image, kind: str = "PNG", **save: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **save)
    return file.getvalue()


def decoded(data: bytes, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    return np.asarray(decode(data, background))


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("kind", "save"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]
)
def test_exif_orientation_is_applied_exactly_and_known_from_the_header(
    kind: str, save: dict[str, Any], orientation: int
) -> None:
    up = noise(20, 33)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](up)))
    data = packed(stored, kind, exif=exif, **save)
    assert probe(data) == Probe(33, 20)
    assert np.array_equal(decoded(data), up)


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_of_a_jpeg(orientation: int) -> None:
    up = np.zeros((32, 48, 3), np.uint8)
    up[:16, :16] = 255  # a white corner at the top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](up)))
    data = packed(stored, "JPEG", exif=exif, quality=95)
    assert probe(data) == Probe(48, 32)
    assert np.abs(decoded(data).astype(int) - up).max() < 12


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_counts_as_none() -> None:
    up = noise(5, 9)
    data = packed(Image.fromarray(up), exif=b"Exif\0\0II*\0nonsense")
    assert probe(data) == Probe(9, 5)
    assert np.array_equal(decoded(data), up)


def test_orientation_behind_the_pixels_of_a_png_does_not_count_in_header_or_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    up = noise(8, 12)
    data = packed(Image.fromarray(up), exif=exif)
    start = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[start : start + 4], "big")
    chunk, rest = data[start : start + length], data[:start] + data[start + length :]
    end = rest.index(b"IEND") - 4
    moved = rest[:end] + chunk + rest[end:]
    assert probe(moved) == Probe(12, 8)
    assert np.array_equal(decoded(moved), up)


def test_transparent_pixels_show_the_background_not_the_colour_behind() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[..., 0] = 200  # red lies hidden under the transparent half
    pixels[0, :, 3] = 255
    data = packed(Image.fromarray(pixels))
    assert decoded(data)[0, 0].tolist() == [200, 0, 0]
    assert decoded(data)[1, 0].tolist() == [255, 255, 255]
    assert decoded(data, (10, 20, 30))[1, 1].tolist() == [10, 20, 30]


def test_half_transparent_pixels_are_blended() -> None:
    pixels = np.full((1, 1, 4), (200, 100, 0, 128), np.uint8)
    share = 128 / 255
    wanted = [round(v * share + 255 * (1 - share)) for v in (200, 100, 0)]
    assert np.abs(decoded(packed(Image.fromarray(pixels)))[0, 0].astype(int) - wanted).max() <= 1


def test_grey_with_alpha_is_flattened() -> None:
    grey = Image.merge("LA", (Image.new("L", (4, 4), 90), Image.new("L", (4, 4), 0)))
    grey.putpixel((0, 0), (90, 255))
    found = decoded(packed(grey))
    assert found.shape == (4, 4, 3)
    assert found[0, 0].tolist() == [90, 90, 90]
    assert found[1, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_flattened(kind: str) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 250])
    for x in range(3):
        image.putpixel((x, 0), x)
    found = decoded(packed(image, kind, transparency=1), (9, 8, 7))
    assert found[0].tolist() == [[250, 0, 0], [9, 8, 7], [0, 0, 250]]


def test_a_transparent_colour_of_an_rgb_png_is_flattened() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (50, 60, 70))
    found = decoded(packed(image, transparency=(1, 2, 3)))
    assert found[0].tolist() == [[255, 255, 255], [50, 60, 70]]


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B")])
def test_sixteen_bit_grey_is_scaled_to_eight(kind: str, mode: str) -> None:
    values = np.array([[0, 128, 257, 1000, 32768, 65535]], ">u2" if mode == "I;16B" else "<u2")
    image = Image.frombytes(mode, (6, 1), values.tobytes())
    data = packed(image, kind)
    assert probe(data) == Probe(6, 1)
    wanted = np.round(values[0] / 257).astype(int).tolist()
    assert decoded(data)[0, :, 0].tolist() == wanted


@pytest.mark.parametrize(("mode", "value", "wanted"), [("1", 1, 255), ("L", 77, 77)])
def test_grey_and_black_and_white_become_rgb(mode: str, value: int, wanted: int) -> None:
    assert decoded(packed(Image.new(mode, (3, 2), value)))[0, 0].tolist() == [wanted] * 3


def test_cmyk_without_a_profile_is_converted() -> None:
    data = packed(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.abs(decoded(data)[8, 8].astype(int) - [255, 0, 0]).max() < 4


def matrix_profile(*, red: str, green: str, blue: str) -> bytes:
    """sRGB with its colorants exchanged, so that a conversion cannot go unseen."""
    made = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tags = {}
    for number in range(int.from_bytes(made[128:132], "big")):
        at = 132 + 12 * number
        tags[made[at : at + 4].decode()] = made[at + 4 : at + 12]
    swap = {"rXYZ": red, "gXYZ": green, "bXYZ": blue}
    data = bytearray(made)
    for number in range(len(tags)):
        at = 132 + 12 * number
        name = bytes(data[at : at + 4]).decode()
        data[at + 4 : at + 12] = tags[swap.get(name, name)]
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_an_embedded_profile_is_converted_to_srgb(kind: str) -> None:
    # In this profile the first channel means green and the second red.
    profile = matrix_profile(red="gXYZ", green="rXYZ", blue="bXYZ")
    save = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = packed(Image.new("RGB", (8, 8), (200, 30, 60)), kind, icc_profile=profile, **save)
    assert np.abs(decoded(data)[4, 4].astype(int) - [30, 200, 60]).max() <= 3


def test_a_profile_applies_under_alpha_too_and_the_background_is_srgb() -> None:
    profile = matrix_profile(red="gXYZ", green="rXYZ", blue="bXYZ")
    image = Image.new("RGBA", (2, 1), (200, 30, 60, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    found = decoded(packed(image, icc_profile=profile), (40, 90, 10)).astype(int)
    assert np.abs(found[0, 0] - [30, 200, 60]).max() <= 1
    assert found[0, 1].tolist() == [40, 90, 10]


def test_an_srgb_profile_changes_nothing_to_speak_of() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    up = noise(16, 16)
    found = decoded(packed(Image.fromarray(up), icc_profile=profile))
    assert np.abs(found.astype(int) - up).max() <= 1


@pytest.mark.parametrize("profile", [b"no profile at all", b"\0" * 200])
def test_a_damaged_profile_is_passed_over(profile: bytes) -> None:
    up = noise(6, 6)
    assert np.array_equal(decoded(packed(Image.fromarray(up), icc_profile=profile)), up)


def test_a_profile_of_another_colour_space_is_passed_over() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    up = noise(6, 6)
    assert np.array_equal(decoded(packed(Image.fromarray(up), icc_profile=lab)), up)


def test_an_rgb_profile_on_a_grey_picture_is_used() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = packed(Image.new("L", (2, 2), 130), icc_profile=profile)
    assert np.abs(decoded(data)[0, 0].astype(int) - 130).max() <= 1


def test_a_lab_picture_is_converted() -> None:
    # L 255 is 100; a and b are neutral at 128.
    data = packed(Image.new("LAB", (2, 2), (255, 128, 128)), "TIFF")
    assert decoded(data).min() > 250


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_picture_has_a_size_but_no_pixels(kind: str) -> None:
    data = packed(Image.fromarray(noise(64, 64)), kind)[:-2000]
    assert probe(data) == Probe(64, 64)
    with pytest.raises(PictureError, match="cannot be decoded"):
        decode(data, WHITE)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"just some text", "not a picture"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 30, "not a picture"),
    ],
)
def test_files_that_are_no_pictures_say_why(data: bytes, reason: str) -> None:
    found = probe(data)
    assert isinstance(found, str)
    assert reason in found


def test_thirty_two_bit_values_are_refused_for_they_have_no_white() -> None:
    assert "does not say what is white" in str(probe(packed(Image.new("F", (2, 2)), "TIFF")))


def test_a_picture_above_pillows_limit_is_refused_by_its_header() -> None:
    data = bytearray(packed(Image.new("L", (1, 1))))
    header = b"IHDR" + (20000).to_bytes(4, "big") * 2 + bytes(data[24:29])
    data[12:33] = header + zlib.crc32(header).to_bytes(4, "big")
    assert probe(bytes(data)) == "larger than 178 megapixels"


def test_downscaling_is_anti_aliased() -> None:
    board = (np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)
    image = Image.fromarray(board).convert("RGB")
    geometry = Geometry((512, 512), (120, 120), (0, 0, 120, 120))
    assert render(image, geometry).std() < 2


def test_the_crop_and_flip_are_those_of_the_geometry() -> None:
    up = noise(40, 60)
    image = Image.fromarray(up)
    geometry = Geometry((60, 40), (60, 40), (7, 5, 32, 16))
    assert np.array_equal(render(image, geometry), up[5:21, 7:39])
    flipped = Geometry((60, 40), (60, 40), (7, 5, 32, 16), flip=True)
    assert np.array_equal(render(image, flipped), up[5:21, 7:39][:, ::-1])
    resized = np.asarray(image.resize((30, 20), Image.Resampling.LANCZOS))
    smaller = Geometry((60, 40), (30, 20), (3, 1, 16, 16))
    assert np.array_equal(render(image, smaller), resized[1:17, 3:19])


def test_a_picture_of_another_size_than_its_header_said_is_refused() -> None:
    with pytest.raises(PictureError, match="its header said"):
        render(Image.new("RGB", (5, 5)), Geometry((6, 5), (6, 5), (0, 0, 5, 5)))
