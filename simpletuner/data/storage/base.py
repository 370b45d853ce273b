"""What the product asks of the place where a dataset's files lie."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

PICTURE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
)
"""Lower-case endings of the files that are taken for pictures."""

UNREAD_SUFFIXES = frozenset(
    f".{ending}"
    for ending in (
        *("heic", "heif", "jp2", "jxl", "psd", "tga", "svg", "exr", "hdr"),
        *("arw", "cr2", "cr3", "dng", "nef", "orf", "raf", "raw", "rw2"),
        *("avi", "mkv", "mov", "mp4", "webm"),
    )
)
"""Endings of pictures and films that nothing here reads: they are told instead of passed over."""


@dataclass(frozen=True)
class FileFacts:
    """What can be known of a file without reading it."""

    size: int
    mtime_ns: int


class Storage(Protocol):
    """A read-only tree of files; keys are relative paths with ``/``, or web addresses."""

    @property
    def title(self) -> str:
        """Where it is, for messages."""

    @property
    def place(self) -> str:
        """What tells it from every other storage whose keys may be the same."""

    def keys(self) -> list[str]:
        """Every picture, sorted; where pictures are named by a table, those that are missing too.

        Raises:
            DataError: The place does not exist or cannot be listed.
        """

    def read(self, key: str) -> bytes:
        """The bytes of a file.

        Raises:
            OSError: It cannot be read.
        """

    def facts(self, key: str) -> FileFacts | None:
        """Size and time of a file; None where there is none, or none before it is read."""


def ending_of(key: str) -> str:
    """The lower-case ending of a file's name, with its dot."""
    return os.path.splitext(key)[1].lower()


def is_text(name: str) -> bool:
    """True unless `name` holds bytes that are not UTF-8, which no table can hold."""
    # Such a byte comes out of the file system as a lone surrogate.
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)
