"""Open files of the store: vectored writes, positioned reads, closed when nobody holds them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

_VECTORS = 1024  # buffers the system takes in one call


class Descriptor:
    """An open file, closed when nobody holds it: a reader may outlive its eviction."""

    def __init__(self, path: Path, flags: int) -> None:
        self.number = os.open(path, flags | os.O_CLOEXEC, 0o666)

    def __del__(self) -> None:
        if "number" in self.__dict__:  # absent when the file could not be opened
            os.close(self.number)

    def expect_random_reads(self) -> None:
        """Keep the system from reading ahead; not every system can be told."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.number, 0, 0, os.POSIX_FADV_RANDOM)

    def write(self, buffers: Iterable[memoryview], offset: int) -> None:
        """Write all of `buffers` from `offset` on."""
        self._move(buffers, lambda views, done: os.pwritev(self.number, views, offset + done))

    def read_into(self, buffers: Iterable[memoryview], offset: int) -> bool:
        """Fill all of `buffers` from `offset` on; False if the file ends before."""
        return self._move(buffers, lambda views, done: os.preadv(self.number, views, offset + done))

    def _move(
        self, buffers: Iterable[memoryview], call: Callable[[list[memoryview], int], int]
    ) -> bool:
        """`call` until all bytes went through: one call may take fewer than it was given."""
        views = [view for view in buffers if view.nbytes]
        first, total = 0, 0
        while first < len(views):
            moved = call(views[first : first + _VECTORS], total)
            if moved == 0:
                return False
            total += moved
            while first < len(views) and moved >= views[first].nbytes:
                moved -= views[first].nbytes
                first += 1
            if moved:
                views[first] = views[first][moved:]
        return True
