"""A dataset in a folder of this machine; the folder is never written to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG

from simpletuner.core.errors import DataError
from simpletuner.data.storage.base import PICTURE_SUFFIXES, UNREAD_SUFFIXES, FileFacts, ending_of

SKIPPED_FOLDERS = frozenset(("$RECYCLE.BIN", "System Volume Information", "__MACOSX", "lost+found"))
"""Folders of operating systems and archivers; hidden ones are skipped by their dot."""


_LISTED = PICTURE_SUFFIXES | UNREAD_SUFFIXES


class LocalStorage:
    """The pictures under a folder, at any depth.

    Links are followed and loops cut; hidden files and folders are skipped.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def title(self) -> str:
        """The folder as the user wrote it."""
        return str(self.root)

    @property
    def place(self) -> str:
        """The folder itself, whatever links lead to it."""
        return str(self.root.resolve())

    def keys(self) -> list[str]:
        """Every picture under the folder, sorted.

        One that nothing here reads is among them, unless a readable one of its name lies beside it.

        Raises:
            DataError: The folder does not exist, is a file, or cannot be listed.
        """
        if not self.root.is_dir():
            what = "is not a folder" if self.root.exists() else "does not exist"
            raise DataError(
                f"the dataset folder {self.root} {what}", fix="correct instance_data_dir"
            )
        keys = list(self._walk(self.root, "", frozenset()))
        if unread := {key for key in keys if ending_of(key) in UNREAD_SUFFIXES}:
            stems = {os.path.splitext(key)[0] for key in keys if key not in unread}
            keys = [k for k in keys if k not in unread or os.path.splitext(k)[0] not in stems]
        return sorted(keys)

    def read(self, key: str) -> bytes:
        """The bytes of a file.

        Raises:
            OSError: There is none, it is no regular file, or it cannot be read.
        """
        path = self.root / key
        if "\0" in key or not S_ISREG(path.stat().st_mode):  # a pipe would never end
            raise OSError("not a file")
        return path.read_bytes()

    def facts(self, key: str) -> FileFacts | None:
        """Size and time of a file, or None where there is none."""
        try:
            found = (self.root / key).stat()
        except (OSError, ValueError):  # reading it says why
            return None
        return FileFacts(found.st_size, found.st_mtime_ns) if S_ISREG(found.st_mode) else None

    def _walk(self, folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        # A loop is a folder that lies inside itself, so only the chain above is remembered: two
        # links to one folder are two sets of keys.
        own = folder.stat()
        identity = (own.st_dev, own.st_ino)
        if identity in above:
            return
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise DataError(
                f"the folder {folder} cannot be listed: {error.strerror}",
                fix="give this user the right to read it, or move it out of the dataset",
            ) from error
        for entry in entries:
            if entry.name.startswith(".") or entry.name in SKIPPED_FOLDERS:
                continue
            if _is_folder(entry):
                yield from self._walk(
                    folder / entry.name, f"{prefix}{entry.name}/", above | {identity}
                )
            elif ending_of(entry.name) in _LISTED:
                yield prefix + entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: a picture by its name, and reading it says why it is none
        return False
