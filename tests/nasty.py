"""A folder with everything that has broken a trainer: odd pictures, odd names, odd captions."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

LONG = "a word after another " * 40
UNUSABLE = {
    "bomb.png": "larger than 178 megapixels",
    "empty.jpg": "the file is empty",
    "no caption.png": "no caption",
    "not a picture.png": "not a picture",
}
"""What the scan refuses, and why."""

TORN = ("torn.jpg", "torn.png")
"""What only decoding finds."""

CAPTIONS: dict[str, list[str]] = {
    **{f"turned_{n}.jpg": [f"turned by {n}"] for n in range(1, 9)},
    "alpha.png": ["half seen through"],
    "grey_alpha.png": ["grey, half seen through"],
    "palette.png": ["a palette with a hole"],
    "cmyk.jpg": ["four inks"],
    "deep.png": ["sixteen bits"],
    "p3.png": ["another gamut"],
    "moving.gif": ["the first frame"],
    "with  two blanks.png": ["blanks in a name"],
    "空の絵 😀.png": ["空の絵"],
    "a/same.png": ["in a"],
    "b/same.png": ["in b"],
    "same.JPG": ["one stem"],
    "western.png": ["caf\xe9 \u2013 na\xefve"],
    "marked.png": ["behind a mark"],
    "windows.png": ["a first line", "a second line"],
    "silent.png": [""],
    "long.png": [LONG.strip()],
}
"""The usable pictures and their captions."""


def make_nasty(folder: Path) -> Path:
    """Write the folder."""
    for part in ("", "a", "b"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, data in _pictures().items():
        (folder / name).write_bytes(data)
    texts: dict[str, bytes] = {
        name: "\n".join(captions).encode() for name, captions in CAPTIONS.items()
    }
    texts |= {name: b"a caption" for name in (*UNUSABLE, *TORN) if name != "no caption.png"}
    texts["western.png"] = CAPTIONS["western.png"][0].encode("cp1252")
    texts["marked.png"] = b"\xef\xbb\xbf" + texts["marked.png"]
    texts["windows.png"] = b"  a first line \r\n\r\na second line\r\n"
    texts["silent.png"] = b" \n"
    for name, data in texts.items():
        (folder / name).with_suffix(".txt").write_bytes(data)
    for file in folder.rglob("*.*"):  # so old that the index trusts their times
        os.utime(file, (1_700_000_000, 1_700_000_000))
    return folder


def _pictures() -> dict[str, bytes]:
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return rng.integers(0, 256, shape, dtype=np.uint8)

    def rgb() -> Image.Image:
        return Image.fromarray(noise(64, 96, 3))

    made = {name: _packed(rgb()) for name in (*CAPTIONS, "no caption.png")}
    for number in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = number
        made[f"turned_{number}.jpg"] = _packed(rgb(), "JPEG", exif=exif)
    made["same.JPG"] = _packed(rgb(), "JPEG")
    made["alpha.png"] = _packed(Image.fromarray(noise(64, 96, 4)))
    made["grey_alpha.png"] = _packed(Image.fromarray(noise(64, 96, 2)))
    palette = rgb().quantize(16)
    made["palette.png"] = _packed(palette, transparency=3)
    made["cmyk.jpg"] = _packed(rgb().convert("CMYK"), "JPEG")
    deep = rng.integers(0, 65536, (64, 96), dtype=np.uint16)
    made["deep.png"] = _packed(Image.fromarray(deep))
    made["p3.png"] = _packed(rgb(), icc_profile=_display_p3())
    frames = [Image.fromarray(noise(64, 96)) for _ in range(3)]
    made["moving.gif"] = _packed(frames[0], "GIF", save_all=True, append_images=frames[1:])
    made["torn.jpg"] = _packed(rgb(), "JPEG")[:2000]
    made["torn.png"] = _packed(rgb())[:9000]
    made["empty.jpg"] = b""
    made["not a picture.png"] = b"<html>404</html>"
    made["bomb.png"] = _bomb()
    return made


def _packed(image: Image.Image, kind: str = "PNG", **save: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **save)
    return file.getvalue()


def _bomb() -> bytes:
    """A PNG of one pixel whose header says 20,000 by 20,000."""
    data = bytearray(_packed(Image.new("L", (1, 1))))
    header = b"IHDR" + (20000).to_bytes(4, "big") * 2 + bytes(data[24:29])
    data[12:33] = header + zlib.crc32(header).to_bytes(4, "big")
    return bytes(data)


def _display_p3() -> bytes:
    """A profile with the primaries of Display P3, from Pillow's sRGB one by exchanging them."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.5151, 0.2412, -0.0011),
        b"gXYZ": (0.2920, 0.6922, 0.0419),
        b"bXYZ": (0.1571, 0.0666, 0.7841),
    }
    for place in range(132, 132 + 12 * int.from_bytes(profile[128:132], "big"), 12):
        tag = bytes(profile[place : place + 4])
        if tag in primaries:
            at = int.from_bytes(profile[place + 4 : place + 8], "big") + 8
            values = (round(value * 65536) for value in primaries[tag])
            profile[at : at + 12] = struct.pack(">iii", *values)
    return bytes(profile)
