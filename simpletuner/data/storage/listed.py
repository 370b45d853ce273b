"""A dataset whose files are named one by one: in a folder of this machine, or on the web."""

from __future__ import annotations

from collections.abc import Iterable

from simpletuner.data.storage.base import FileFacts, Storage
from simpletuner.data.storage.web import SCHEMES


class ListedStorage:
    """The files that a table names, those that are missing too.

    Args:
        names: Paths in `folder`, and web addresses.
        folder: Where paths lead.
        web: Where addresses lead.
        title: What lists them, for messages.
    """

    def __init__(self, names: Iterable[str], folder: Storage, web: Storage, title: str) -> None:
        self._names = sorted(set(names))
        self._folder = folder
        self._web = web
        self.title = title

    @property
    def place(self) -> str:
        """That of the folder: an address means the same everywhere."""
        return self._folder.place

    def keys(self) -> list[str]:
        """Every name, sorted, whether there is such a file or not."""
        return self._names

    def read(self, key: str) -> bytes:
        """The bytes of a file."""
        return self._holder(key).read(key)

    def facts(self, key: str) -> FileFacts | None:
        """Size and time of a file, or None where there is none."""
        return self._holder(key).facts(key)

    def _holder(self, key: str) -> Storage:
        return self._web if key.startswith(SCHEMES) else self._folder
