"""A folder of packs: tensors by key, written once, read at offsets straight into the batch.

No locks and no coordinator: each process writes packs of its own and sees those of others when it
looks for a key it does not know. A pack that is damaged is refused and reported, an entry that is
damaged is marked; they count as missing, so the next start encodes them again.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from simpletuner.cache.disk import Descriptor
from simpletuner.cache.index import Index, Row
from simpletuner.cache.packs import (
    DAMAGED,
    PACK,
    PART,
    PARTIAL,
    Entry,
    Layout,
    Limits,
    PackWriter,
    Parcel,
    damage_mark,
    tensor_bytes,
)
from simpletuner.cache.parts import (
    DamagedPackError,
    as_table,
    read_part,
    rebuild_entries,
    write_part,
)
from simpletuner.core.errors import CacheError
from simpletuner.core.files import free_space, write_bytes

if TYPE_CHECKING:
    from simpletuner.core.events import Bus

log = logging.getLogger(__name__)

_OPEN_PACKS = 128


class DamagedEntryError(CacheError):
    """An entry cannot be read back as it was written; it was marked where that is possible."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say what a damaged entry held, in the user's words."""
    try:
        yield
    except DamagedEntryError as error:
        raise DamagedEntryError(f"{error.message} ({what})", fix=error.fix) from None


class TensorStore:
    """Tensors by 16-byte key, in packs inside one folder; may be used from several threads.

    Args:
        folder: Made when the first entry is put.
        rank: Part of the names of the packs written here.
        write_batch_size: Entries gathered before one write (64 MB are never exceeded).
        limits: When a pack is sealed.
        bus: Hears of damaged packs and rebuilt parts.

    Attributes:
        refused: Why, by file name, for every pack that is not used.
        partials: Unfinished packs seen when the folder was opened; another run may be at work.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int = 0,
        write_batch_size: int = 128,
        limits: Limits | None = None,
        bus: Bus | None = None,
    ) -> None:
        self.folder = folder
        self.refused: dict[str, str] = {}
        self.partials = 0
        self._rank, self._gather, self._bus = rank, write_batch_size, bus
        self._limits = limits or Limits()
        self._lock = threading.RLock()
        self._index = Index()
        self._packs: list[Path] = []
        self._known: set[str] = set()
        self._marked: dict[str, set[bytes]] = {}  # damaged entries by the stem of their pack
        self._writer: PackWriter | None = None
        self._writing = -1  # the number of the pack being written
        self._descriptors: OrderedDict[int, Descriptor] = OrderedDict()

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        rank: int = 0,
        write_batch_size: int = 128,
        limits: Limits | None = None,
        bus: Bus | None = None,
    ) -> TensorStore:
        """The store in `folder`, with every sealed pack; a part that is missing is rebuilt.

        Raises:
            CacheError: The folder exists and cannot be read.
        """
        store = cls(folder, rank=rank, write_batch_size=write_batch_size, limits=limits, bus=bus)
        store._scan(rebuild=True)
        store._report()
        return store

    def __len__(self) -> int:
        return len(self._index)

    # --- finding ---------------------------------------------------------------------------------

    def locate(self, keys: Sequence[bytes]) -> NDArray[np.int32]:
        """The row of each key, −1 where it is missing; rows stay valid while the store is open."""
        with self._lock:
            if self._writer is not None and self._writer.due:
                self.seal()
            rows = self._index.locate(keys)
            if (rows < 0).any() and self._scan(rebuild=False):
                rows = self._index.locate(keys)
            return rows

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those of `keys` that are not here, sorted, each once."""
        asked = sorted(set(keys))
        rows = self.locate(asked)
        return [key for key, row in zip(asked, rows, strict=True) if row < 0]

    def layout(self, row: int) -> Layout:
        """Names, dtypes and shapes of the tensors in `row`."""
        with self._lock:
            return self._index.row(row).layout

    # --- reading ---------------------------------------------------------------------------------

    def get(self, key: bytes) -> dict[str, torch.Tensor]:
        """The tensors of `key`, in memory of their own.

        Raises:
            CacheError: It is missing or damaged.
        """
        (row,) = self.locate([key])
        if row < 0:
            raise CacheError(f"{self.folder} has no entry {key.hex()}")
        tensors = {s.name: torch.empty(s.shape, dtype=s.dtype) for s in self.layout(row)}
        self.read_into(row, tensors)
        return tensors

    def read_into(self, row: int, out: Mapping[str, torch.Tensor]) -> None:
        """Read row `row` into `out` by one system call; tensors of the entry not in it are skipped.

        Args:
            row: From `locate`.
            out: Contiguous CPU tensors, or slices of a batch, of the entry's dtypes and shapes.

        Raises:
            CacheError: The pack is gone.
            DamagedEntryError: The entry is cut short, or has a byte that was not written so.
        """
        with self._lock:
            found = self._index.row(row)
            descriptor = self._descriptor(found.pack)
        buffers, end = [], 0
        for slot in found.layout:
            buffers.append(memoryview(bytearray(slot.offset - end)))
            tensor = out.get(slot.name)
            if tensor is None:
                tensor = torch.empty(slot.shape, dtype=slot.dtype)
            elif tensor.shape != slot.shape or tensor.dtype != slot.dtype:
                raise ValueError(
                    f"{slot.name} is {slot.dtype} {list(slot.shape)} in the cache, "
                    f"not {tensor.dtype} {list(tensor.shape)}"
                )
            buffers.append(tensor_bytes(tensor))
            end = slot.offset + slot.nbytes
        try:
            whole = descriptor.read_into(buffers, found.offset)
        except OSError as error:
            self._damaged(found, f"cannot be read ({error.strerror})")
        crc = 0
        for buffer in buffers:
            crc = crc32(buffer, crc)
        if not whole or crc != found.crc:
            self._damaged(found, "is damaged" if whole else "is cut short")

    def _descriptor(self, pack: int) -> Descriptor:
        writer = self._writer
        if writer is not None and pack == self._writing:
            try:
                writer.flush()
            except OSError as error:
                self._give_up(error)
            return writer.descriptor
        descriptor = self._descriptors.pop(pack, None)
        if descriptor is None:
            try:
                descriptor = Descriptor(self._packs[pack], os.O_RDONLY)
            except OSError as error:
                raise CacheError(
                    f"{self._packs[pack]} cannot be opened any more: {error.strerror}",
                    fix="start again: what was in it is encoded again",
                ) from None
            descriptor.expect_random_reads()
        self._descriptors[pack] = descriptor
        if len(self._descriptors) > _OPEN_PACKS:
            self._descriptors.popitem(last=False)
        return descriptor

    def _damaged(self, row: Row, what: str) -> NoReturn:
        """Mark the entry, so that the next start encodes it again, and nothing else."""
        path = self._packs[row.pack]
        try:
            write_bytes(self.folder / f"{path.stem}.{row.key.hex()}{DAMAGED}", b"")
            fix = "start again: it is encoded again, and the rest is kept"
        except OSError:
            fix = (
                f"remove {path.name} and {path.stem}{PART} there and start again: "
                "what was in it is encoded again"
            )
        raise DamagedEntryError(f"{path} {what} at entry {row.key.hex()}", fix=fix) from None

    # --- writing ---------------------------------------------------------------------------------

    def put(self, key: bytes, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add an entry; it can be read at once here, and by others once its pack is sealed.

        Args:
            key: 16 bytes; where the open pack has such an entry, it stays; in
                another pack, it stays the one that is found.
            tensors: Of any device; those on the CPU must not be changed afterwards.

        Raises:
            CacheError: The disk is full, or the folder cannot be written.
        """
        if len(key) != 16:
            raise ValueError("a key has 16 bytes")
        parcel = Parcel.of(key, tensors)
        with self._lock:
            if self._index.waits(key):
                return
            try:
                writer = self._writer or self._begin()
                entry = writer.add(parcel)
                if entry is None:
                    self.seal()
                    writer = self._begin()
                    entry = writer.add(parcel)
                assert entry is not None, "an empty pack takes any entry or raises"
            except OSError as error:
                self._give_up(error)
            self._index.append(entry, self._writing)
            if writer.due:
                self.seal()

    def seal(self) -> None:
        """Make everything put so far durable and visible to others.

        Raises:
            CacheError: The disk is full, or the folder cannot be written.
        """
        with self._lock:
            writer, self._writer = self._writer, None
            if writer is None:
                return
            try:
                self._packs[self._writing] = writer.seal()
                write_part(self.folder / f"{writer.stem}{PART}", writer.entries)
            except OSError as error:
                self._give_up(error)
            self._index.settle()

    def close(self) -> None:
        """Seal, and let go of open files."""
        try:
            self.seal()
        finally:
            with self._lock:
                self._descriptors.clear()

    def _begin(self) -> PackWriter:
        now = int(time.time() * 1000)
        stem = f"{now:013x}-{self._rank:03d}-{secrets.token_hex(4)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._writer = PackWriter(self.folder, stem, self._limits, self._gather)
        self._packs.append(self._writer.path)
        self._writing = len(self._packs) - 1
        self._known.add(stem)
        return self._writer

    def _give_up(self, error: OSError) -> NoReturn:
        """What was sealed stays; the open pack stays as it is, for its end may be missing."""
        self._writer = None
        raise CacheError(
            f"the cache in {self.folder} cannot be written: {error.strerror}",
            fix=f"{free_space(self.folder)}: make room, or set the cache's folder to another disk, "
            "then start again: only what is missing is encoded",
        ) from error

    # --- the folder ------------------------------------------------------------------------------

    def _scan(self, *, rebuild: bool) -> bool:
        """Take in packs that appeared since; True if there were any.

        Args:
            rebuild: Make parts that are missing. Otherwise their packs are left for the next open:
                another writer may be about to write them.
        """
        try:
            names = set(os.listdir(self.folder))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise CacheError(f"{self.folder} cannot be read: {error.strerror}") from None
        if rebuild:
            self.partials = sum(name.endswith(PARTIAL) for name in names)
        stems = {Path(name).stem for name in names if name.endswith((PACK, PART))}
        found = []
        self._note_damaged(names)
        for stem in sorted(stems - self._known):
            if rebuild or {f"{stem}{PACK}", f"{stem}{PART}"} <= names:
                self._known.add(stem)
                table = self._read(stem, names)
                if table is not None:
                    self._packs.append(self.folder / f"{stem}{PACK}")
                    found.append((self._undamaged(stem, table), len(self._packs) - 1))
        if found:
            self._index.settle(found)
        return bool(found)

    def _note_damaged(self, names: Collection[str]) -> None:
        for name in names:
            mark = damage_mark(name)
            if mark is not None:
                stem, key = mark
                self._marked.setdefault(stem, set()).add(key)

    def _undamaged(self, stem: str, table: pa.Table) -> pa.Table:
        marked = self._marked.get(stem)
        if not marked:
            return table
        keys = pa.array(sorted(marked), table.schema.field("key").type)
        return table.filter(pc.invert(pc.is_in(table["key"], value_set=keys)))

    def _read(self, stem: str, names: Collection[str]) -> pa.Table | None:
        """The part of a pack, rebuilt if need be; None if the pack cannot be used."""
        pack, part = self.folder / f"{stem}{PACK}", self.folder / f"{stem}{PART}"
        if pack.name not in names:
            self.refused[part.name] = "its pack is gone"
            return None
        try:
            if part.name in names:
                return read_part(part, pack.stat().st_size)
        except DamagedPackError as error:
            log.warning("%s %s", part, error)
        except FileNotFoundError:
            return None
        try:
            entries = rebuild_entries(pack)
        except DamagedPackError as error:
            self.refused[pack.name] = error.message
            return None
        self._write_back(part, entries)
        return as_table(entries)

    def _write_back(self, part: Path, entries: Sequence[Entry]) -> None:
        try:
            write_part(part, entries)
        except OSError as error:  # a folder that may only be read: rebuilt again by the next open
            log.warning("%s cannot be written: %s", part, error)
            return
        if self._bus is not None:
            self._bus.notice(f"{part} was missing or damaged and was rebuilt from its pack")

    def _report(self) -> None:
        if self._bus is None:
            return
        for name, reason in self.refused.items():
            self._bus.notice(
                f"{self.folder / name} is not used: {reason}; what it held counts as missing",
                level="warning",
            )
        for stem, keys in self._marked.items():
            gone = [key.hex() for key in self.missing(list(keys))]
            if gone:
                self._bus.notice(
                    f"{self.folder / stem}{PACK} was found damaged at {', '.join(gone)};"
                    " this counts as missing",
                    level="warning",
                )
        if self.partials:
            self._bus.notice(
                f"{self.partials} unfinished packs in {self.folder} are not used; files ending in "
                f"{PARTIAL} may be removed when no other run uses this folder"
            )
