"""The index of a dataset: one Parquet table, kept current by looking only at what has changed.

Columns: path, size, mtime_ns, content (16 bytes), width, height (after orientation), alpha (it may
be transparent), frames (it has several), status (``ok`` or ``reject``), reason; caption_size,
caption_mtime_ns, caption_shared (it is the folder's), caption, caption_reason of the text file
beside the picture, where the dataset reads one. Sorted by path.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from simpletuner.core.errors import CacheError, DataError
from simpletuner.core.events import Bus, Stage, StageProgress
from simpletuner.core.files import write_through, writing
from simpletuner.data.captions import decode_text, folder_text_key, other_text_keys, text_key
from simpletuner.data.columns import COLUMNS, TEXT_COLUMNS
from simpletuner.data.looking import CANNOT_READ, NO_FACTS, UNSURE, Look, settled
from simpletuner.data.pixels import PictureError
from simpletuner.data.storage.base import Storage, is_text

FORMAT = b"2"
DECODER = PIL.__version__.encode()

CHUNK = 1024
"""Files looked at between two reports of progress."""

SAVE_SECONDS = 60.0
"""A long first scan is saved this often, so that a kill does not lose it."""

NO_CAPTION = "no caption"


@dataclass(frozen=True)
class _Listing:
    """Size and time of n files, in the order of their keys; NO_FACTS where there is none."""

    size: NDArray[np.int64]
    mtime_ns: NDArray[np.int64]


class Index:
    """The table of one dataset in its file.

    Args:
        file: Where it is kept, never inside the dataset.
        storage: The dataset's files.
        workers: Threads that read, hash and probe, or processes where there are many files.
        bus: Told of progress.
        title: What progress is called.
    """

    def __init__(self, file: Path, storage: Storage, *, workers: int, bus: Bus, title: str) -> None:
        self.file = file
        self.storage = storage
        self.workers = workers
        self.bus = bus
        self.title = title

    @property
    def _place(self) -> bytes:
        return self.storage.place.encode(errors="surrogateescape")

    def load(self) -> pa.Table:
        """The table as it was saved; empty if there is none that can be read.

        One of another folder has no times: equal names, sizes and times make no equal files there.
        """
        try:
            table = pq.read_table(self.file, page_checksum_verification=True)
            marks = table.schema.metadata or {}
            if marks.get(b"format") != FORMAT:
                return COLUMNS.empty_table()
            table = table.select(COLUMNS.names).cast(COLUMNS)
            if marks.get(b"decoder") != DECODER:  # another one may read what that could not
                table = table.filter(pc.not_equal(table["status"], "reject"))
            return table if marks.get(b"place") == self._place else _of_another_place(table)
        except FileNotFoundError:
            return COLUMNS.empty_table()
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            self.bus.notice(f"the index {self.file} is made anew: {error}", "warning")
            return COLUMNS.empty_table()

    def save(self, table: pa.Table) -> None:
        """Replace the file by `table`, whole or not at all.

        Raises:
            CacheError: The disk refused.
        """
        marked = table.replace_schema_metadata(
            {b"format": FORMAT, b"decoder": DECODER, b"place": self._place}
        )
        fix = "make room, or set cache_dir to another disk, then start again"
        with writing(CacheError, self.file.name, self.file.parent, fix):
            write_through(
                self.file,
                lambda path: pq.write_table(
                    marked, path, compression="zstd", write_page_checksum=True
                ),
            )

    def scan(self, *, texts: bool, told: Callable[[pa.Array], pa.Array] | None = None) -> pa.Table:
        """Bring the table up to date and save it.

        Args:
            texts: Every picture has a text file beside it.
            told: The captions that so many paths have from elsewhere, null for none.

        Raises:
            DataError: The dataset cannot be listed.
            CacheError: The table cannot be saved.
        """
        old = self.load()
        keys = self._nameable(self.storage.keys())
        with ThreadPoolExecutor(self.workers, thread_name_prefix="index") as pool:
            table, read = self._files(old, keys, pool)
            table = self._texts(table, pool) if texts else _without_texts(table)
        if told is not None:
            column = table.schema.get_field_index("caption")
            captions = told(table["path"].combine_chunks())
            table = table.set_column(column, COLUMNS.field("caption"), captions)
        if not table.equals(old):
            self.save(table)
        note = f"{len(table)} pictures, {read} new or changed"
        self._tell(Stage, "finished", done=read, total=read, note=note)
        return table

    def read(self, path: str, content: str, where: str) -> bytes:
        """The bytes of a file of the table.

        Args:
            path: In the storage.
            content: Their digest in the table.
            where: What messages call the file.

        Raises:
            PictureError: It cannot be read.
            DataError: It is not the file that was indexed.
        """
        try:
            data = self.storage.read(path)
        except OSError as error:
            raise PictureError(f"{CANNOT_READ}{error.strerror or error}", where) from error
        if blake2b(data, digest_size=16).hexdigest() != content:
            raise DataError(
                f"{where} was changed after it was indexed",
                fix="start again; if this comes back, touch the file and start again",
            )
        return data

    def _files(
        self, old: pa.Table, keys: list[str], pool: ThreadPoolExecutor
    ) -> tuple[pa.Table, int]:
        paths = pa.array(keys, pa.string())
        now = self._listing(keys, pool)
        same, at = _unchanged(old, paths, now)
        todo = np.flatnonzero(~same)
        looks = Look(self.storage, _rejected(old))
        parts = [old.take(pa.array(at[same]))]
        self._tell(Stage, "running", total=len(todo))
        saved, done = time.monotonic(), 0
        chunks = [
            [(keys[i], int(now.size[i]), int(now.mtime_ns[i])) for i in rows.tolist()]
            for _, rows in _chunks(todo)
        ]
        for found in looks.all(chunks, pool, self.workers):
            parts.append(found)
            done += len(found)
            self._tell(StageProgress, "running", done=done, total=len(todo))
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save(pa.concat_tables(parts).sort_by("path"))
                saved = time.monotonic()
        table = pa.concat_tables(parts).combine_chunks()
        order = np.argsort(np.concatenate((np.flatnonzero(same), todo)))
        return table.take(pa.array(order)), len(todo)

    def _texts(self, table: pa.Table, pool: ThreadPoolExecutor) -> pa.Table:
        owns = [text_key(path) for path in table["path"].to_pylist()]
        facts = self._as_written(owns, self._listing(owns, pool), pool)
        keys, now = self._with_folder_texts(list(owns), facts, pool)
        there = now.size >= 0
        shared = np.array([key != own for key, own in zip(keys, owns, strict=True)], np.bool_)
        known = table["caption_shared"].combine_chunks().fill_null(False)
        same = there & (shared == known.to_numpy(zero_copy_only=False))
        same &= now.size == _numbers(table["caption_size"])
        same &= now.mtime_ns == _numbers(table["caption_mtime_ns"])
        todo = np.flatnonzero(there & ~same)
        parts, cp1252 = [table.select(TEXT_COLUMNS.names)], []
        for _, rows in _chunks(todo):
            look = [(keys[i], int(now.size[i]), int(now.mtime_ns[i])) for i in rows.tolist()]
            read = list(pool.map(self._read_text, look))
            for i, (row, _) in zip(rows.tolist(), read, strict=True):
                row["caption_shared"] = bool(shared[i])
            cp1252 += [
                key for key, (_, encoding) in zip(look, read, strict=True) if encoding == "cp1252"
            ]
            parts.append(pa.Table.from_pylist([row for row, _ in read], TEXT_COLUMNS))
        if cp1252:
            self._tell_some("not UTF-8, read as cp1252", [key for key, _, _ in cp1252])
        source = np.where(same, np.arange(len(table)), -1)
        source[todo] = len(table) + np.arange(len(todo))
        texts = pa.concat_tables(parts).take(pa.array(source, mask=source < 0))
        for name in TEXT_COLUMNS.names:
            column = table.schema.get_field_index(name)
            table = table.set_column(column, COLUMNS.field(name), texts[name])
        return table.combine_chunks()

    def _as_written(self, keys: list[str], now: _Listing, pool: ThreadPoolExecutor) -> _Listing:
        """The text of each picture whose text has its name in another way; `keys` name it then."""
        bare = np.flatnonzero(now.size < 0).tolist()
        others = [(row, other) for row in bare for other in other_text_keys(keys[row])]
        facts = self._listing([other for _, other in others], pool)
        for at in np.flatnonzero(facts.size >= 0)[::-1].tolist():  # the first of a picture counts
            row, other = others[at]
            keys[row] = other
            now.size[row], now.mtime_ns[row] = facts.size[at], facts.mtime_ns[at]
        return now

    def _with_folder_texts(
        self, keys: list[str], now: _Listing, pool: ThreadPoolExecutor
    ) -> tuple[list[str], _Listing]:
        """The text of its folder for each picture without one of its own, where there is such."""
        bare = np.flatnonzero(now.size < 0).tolist()
        wanted = {row: folder_text_key(keys[row]) for row in bare}
        shared = sorted(set(wanted.values()).difference(keys))  # else it belongs to one picture
        facts = self._listing(shared, pool)
        at = {key: i for i, key in enumerate(shared) if facts.size[i] >= 0}
        found = [row for row in bare if wanted[row] in at]
        if not found:
            return keys, now
        source = [at[wanted[row]] for row in found]
        now.size[found], now.mtime_ns[found] = facts.size[source], facts.mtime_ns[source]
        for row in found:
            keys[row] = wanted[row]
        self.bus.notice(
            f"{self.storage.title}: pictures without a text file of their own that take the"
            f" default.txt of their folder: {len(found)}"
        )
        return keys, now

    def _read_text(self, known: tuple[str, int, int]) -> tuple[dict[str, Any], str]:
        key, size, mtime_ns = known
        row = {"caption_size": size, "caption_mtime_ns": settled(mtime_ns)}
        try:
            decoded = decode_text(self.storage.read(key))
        except OSError as error:
            reason = f"caption cannot be read: {error.strerror or error}"
            return {**row, "caption_mtime_ns": UNSURE, "caption_reason": reason}, ""
        if decoded is None:
            return {**row, "caption_reason": "caption is neither UTF-8 nor cp1252"}, ""
        text, encoding = decoded
        return {**row, "caption": text}, encoding

    def _nameable(self, keys: list[str]) -> list[str]:
        """The keys a table can hold: a name that is not UTF-8 is no text."""
        named = [key for key in keys if is_text(key)]
        if len(named) < len(keys):
            odd = [repr(key) for key in set(keys).difference(named)]
            self._tell_some("left out, for their names are not UTF-8", sorted(odd))
        return named

    def _tell_some(self, what: str, keys: Sequence[str]) -> None:
        more = f" and {len(keys) - 10} more" if len(keys) > 10 else ""
        text = f"{self.storage.title}: {what}: {', '.join(keys[:10])}{more}"
        self.bus.notice(text, "warning")

    def _listing(self, keys: Sequence[str], pool: ThreadPoolExecutor) -> _Listing:
        def facts(some: Sequence[str]) -> list[tuple[int, int]]:
            found = [self.storage.facts(key) for key in some]
            return [(f.size, f.mtime_ns) if f else (NO_FACTS, NO_FACTS) for f in found]

        pieces = [keys[i : i + CHUNK] for i in range(0, len(keys), CHUNK)]
        made = [np.array(piece, np.int64) for piece in pool.map(facts, pieces)]
        both = np.concatenate(made) if made else np.empty((0, 2), np.int64)
        return _Listing(both[:, 0], both[:, 1])

    def _tell(
        self, kind: Callable[..., Stage], state: str, *, done: int = 0, total: int, note: str = ""
    ) -> None:
        self.bus.emit(kind(stage=self.title, state=state, done=done, total=total, note=note))


def _unchanged(
    old: pa.Table, paths: pa.Array, now: _Listing
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which of `paths` stand in `old` with the same facts, and in which row."""
    if not len(old):
        return np.zeros(len(paths), np.bool_), np.zeros(len(paths), np.int64)
    found = pc.index_in(paths, value_set=old["path"].combine_chunks())
    at = found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    same = (at >= 0) & (now.size >= 0) & (_numbers(old["size"])[at] == now.size)
    return same & (_numbers(old["mtime_ns"])[at] == now.mtime_ns), at


def _of_another_place(table: pa.Table) -> pa.Table:
    """`table` whose files are all looked at again; what it knows of their contents stays."""
    for name in ("mtime_ns", "caption_mtime_ns"):
        column = table.schema.get_field_index(name)
        unsure = pa.array(np.full(len(table), UNSURE, np.int64))
        table = table.set_column(column, COLUMNS.field(name), unsure)
    return table


def marked(
    table: pa.Table, there: pa.Array | pa.ChunkedArray, status: Any, why: pa.Array | pa.ChunkedArray
) -> pa.Table:
    """`table` with what looking into some pictures has found.

    What cannot be read may be readable later, without a change of the file: it is looked at again.

    Args:
        table: Of an index, n rows.
        there: [n] which of them were looked into.
        status: Their status, one for all or [n].
        why: [n] the reason of those that cannot be used, else null.
    """
    unsure = pc.and_(there, pc.fill_null(pc.starts_with(why, CANNOT_READ), False))
    for name, rows, values in (
        ("status", there, status),
        ("reason", there, why),
        ("mtime_ns", unsure, pa.scalar(UNSURE, pa.int64())),
    ):
        column = table.schema.get_field_index(name)
        table = table.set_column(column, name, pc.if_else(rows, values, table[name]))
    return table


def _rejected(old: pa.Table) -> dict[bytes, str]:
    """Why contents could not be used when they were looked at; a younger file may be the same."""
    faulty = old.filter(pc.and_(pc.equal(old["status"], "reject"), pc.is_valid(old["content"])))
    known = zip(faulty["content"].to_pylist(), faulty["reason"].to_pylist(), strict=True)
    return {content: why for content, why in known if not why.startswith(CANNOT_READ)}


def _numbers(column: pa.ChunkedArray) -> NDArray[np.int64]:
    filled = column.combine_chunks().fill_null(NO_FACTS)
    numbers: NDArray[np.int64] = filled.to_numpy(zero_copy_only=False).astype(np.int64)
    return numbers


def _without_texts(table: pa.Table) -> pa.Table:
    empty = TEXT_COLUMNS.empty_table()
    for name in empty.column_names:
        column = table.schema.get_field_index(name)
        field = COLUMNS.field(name)
        table = table.set_column(column, field, pa.nulls(len(table), field.type))
    return table


def _chunks(rows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Pieces of `rows`, each with how many are done when it is."""
    for start in range(0, len(rows), CHUNK):
        piece = rows[start : start + CHUNK]
        yield start + len(piece), piece
