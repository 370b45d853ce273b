"""What an index records of a file, found by threads, or for many files by processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

import pyarrow as pa

from simpletuner.core.text import LARGE_PICTURE
from simpletuner.data.columns import COLUMNS
from simpletuner.data.probe import probe
from simpletuner.data.storage.base import UNREAD_SUFFIXES, Storage, ending_of
from simpletuner.data.storage.local import LocalStorage

Known = tuple[str, int, int]
"""A file's path, size and time."""

MANY = 20_000
"""So many files are worth the half second that processes take to start; threads share one
interpreter, which looks at 7,000 small files a second."""

FRESH_NS = 2_000_000_000
"""A file changed this short before the scan may change again within one tick of its clock."""

NO_FACTS = -1
UNSURE = -2
"""Stored as mtime_ns where the file must be looked at again next time."""

CANNOT_READ = "cannot be read: "
"""How the reason begins that may be gone without a change of the file."""

NO_FILE = "there is no such file"


@dataclass(frozen=True)
class Look:
    """Reads, hashes and probes a file.

    Args:
        storage: Where it is.
        rejected: Why contents could not be used before.
    """

    storage: Storage
    rejected: Mapping[bytes, str]

    def __call__(self, known: Known) -> dict[str, Any]:
        """A row of an index without its text columns."""
        path, size, mtime_ns = known
        if (ending := ending_of(path)) in UNREAD_SUFFIXES:
            reason = f"{ending} files are not read; save it as PNG or JPEG"
            row = {"path": path, "size": size, "mtime_ns": mtime_ns}
            return {**row, "status": "reject", "reason": reason}
        try:
            data = self.storage.read(path)
        except OSError as error:
            # A right that is given later does not change the file: look again next time.
            gone = isinstance(error, FileNotFoundError)
            reason = NO_FILE if gone else f"{CANNOT_READ}{error.strerror or error}"
            unsure = {"path": path, "size": size, "mtime_ns": UNSURE}
            return {**unsure, "status": "reject", "reason": reason}
        if size == NO_FACTS and (facts := self.storage.facts(path)):  # reading has fetched it
            size, mtime_ns = facts.size, facts.mtime_ns
        content = blake2b(data, digest_size=16).digest()
        row = {"path": path, "size": size, "mtime_ns": settled(mtime_ns), "content": content}
        if held := self.rejected.get(content):
            return {**row, "status": "reject", "reason": held}
        found = probe(data)
        if isinstance(found, str):
            return {**row, "status": "reject", "reason": found}
        return {**row, **asdict(found), "status": "ok"}

    def together(self, some: Sequence[Known]) -> pa.Table:
        """The rows of some files."""
        return pa.Table.from_pylist([self(each) for each in some], COLUMNS)

    def all(
        self, chunks: Sequence[Sequence[Known]], threads: ThreadPoolExecutor, workers: int
    ) -> Iterator[pa.Table]:
        """The rows of each chunk of files, in their order.

        Args:
            threads: Look at the files of a chunk, where there are not many.
            workers: Processes, where there are.
        """
        count = sum(map(len, chunks))
        if count < MANY or workers < 2 or not isinstance(self.storage, LocalStorage):
            for chunk in chunks:
                yield pa.Table.from_pylist(list(threads.map(self, chunk)), COLUMNS)
            return
        context = multiprocessing.get_context("spawn")  # a fork would copy locks of other threads
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_let_go) as pool:
            try:
                yield from pool.map(self.together, chunks)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def _let_go() -> None:
    """Leave Ctrl-C to the process that started this one, which ends it, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.filterwarnings("ignore", message=LARGE_PICTURE)


def _end_with_parent() -> None:
    """A killed process ends no other: each of these would wait for work for ever."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def settled(mtime_ns: int) -> int:
    """`mtime_ns`, or UNSURE if the file is so young that it may change unseen."""
    return UNSURE if abs(time.time_ns() - mtime_ns) < FRESH_NS else mtime_ns
