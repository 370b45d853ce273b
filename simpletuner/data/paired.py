"""What goes with the pictures of a dataset: masks, control pictures, references; a file for each.

A mask is white where something is learned. A mask, a control picture and a strict reference have
the shape of their picture and are cut as it is; a loose reference has its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from simpletuner.core.events import Bus, Stage, StageProgress
from simpletuner.core.files import safe_name
from simpletuner.core.seeds import key64
from simpletuner.data.columns import bytes16, sizes_of
from simpletuner.data.geometry import Keys, Sizes
from simpletuner.data.index import CHUNK, Index, marked
from simpletuner.data.pairing import pair
from simpletuner.data.pixels import PictureError, decode
from simpletuner.data.rules import background
from simpletuner.data.settings import DatasetSettings
from simpletuner.data.storage.local import LocalStorage

_BLACK = (0, 0, 0)

_WHOLE = "whole"
"""The status of a file that was decoded, beside those of an index."""

WORDS = MappingProxyType(
    {
        "mask": "mask",
        "controlnet": "control picture",
        "reference_strict": "reference",
        "reference_loose": "reference",
    }
)
"""What one file of each conditioning_type is called."""


class Paired:
    """The m files of one conditioning dataset; build it with `open`.

    Attributes:
        id: Its name.
        kind: Its conditioning_type.
        word: What one of its files is called.
        settings: Its entry.
    """

    def __init__(self, settings: DatasetSettings, index: Index, table: pa.Table) -> None:
        assert settings.conditioning_type is not None, "checked with the settings"
        self.id, self.kind = settings.id, settings.conditioning_type
        self.word = WORDS[self.kind]
        self.settings = settings
        self._index = index
        self._table = table

    @property
    def columns(self) -> tuple[str, str]:
        """The names of the columns that `beside` adds."""
        return f"file of {self.id}", f"fault of {self.id}"

    @classmethod
    def open(cls, settings: DatasetSettings, *, index_folder: Path, bus: Bus) -> Paired:
        """Scan the files, looking only at what has changed since the last time.

        Raises:
            DataError: The folder is missing.
        """
        assert settings.instance_data_dir is not None, "checked with the settings"
        index = Index(
            # Apart from the indexes of pictures, which know no file that was decoded.
            index_folder / "masks" / f"{safe_name(settings.id)}.parquet",
            LocalStorage(settings.instance_data_dir),
            workers=min(settings.max_workers, os.cpu_count() or 1),
            bus=bus,
            title=f"index {settings.id}",
        )
        return cls(settings, index, index.scan(texts=False))

    def beside(self, table: pa.Table) -> tuple[pa.Table, list[str]]:
        """Find the file of each picture.

        Args:
            table: Of n pictures.

        Returns:
            `table` with two more columns, `columns`: the number of each picture's file, and why
            there is none that can be used, one of which is null; and the paths of the files that
            belong to no picture.
        """
        pairs = pair(table["path"], self._table["path"])
        rows = pa.array(pairs.rows, mask=pairs.rows < 0)
        found = self._table.select(["path", "width", "height", "status", "reason"]).take(rows)
        file = pc.binary_join_element_wise(f"its {self.word}", found["path"], " ")
        broken = pc.binary_join_element_wise(file, found["reason"], ": ")
        sizes = pc.binary_join_element_wise(_shown(found), _shown(table), ", the picture ")
        misfit = pc.binary_join_element_wise(file, sizes, " is ")
        lacking = pc.if_else(pa.array(pairs.several), f"several {self.word}s", f"no {self.word}")
        lacking = pc.binary_join_element_wise(lacking, f"in {self.id}", " ")
        good = pc.fill_null(pc.not_equal(found["status"], "reject"), False)
        why = pc.if_else(pc.is_null(rows), lacking, pc.if_else(good, misfit, broken))
        if self.kind != "reference_loose":
            good = pc.and_(good, _alike(found, table))
        for name, values, there in zip(
            self.columns, (rows, why), (good, pc.invert(good)), strict=True
        ):
            nothing = pa.scalar(None, values.type)
            table = table.append_column(name, pc.if_else(there, values, nothing))
        return table, pairs.alone.to_pylist()

    def decoded(self, rows: NDArray[np.int32]) -> Paired:
        """Decode those of some files that never were; what is found is kept until they change.

        Args:
            rows: The numbers of the files.

        Returns:
            The same with those marked that cannot be decoded; itself if there is none.

        Raises:
            DataError: One is not the file that was indexed.
            CacheError: What is found cannot be saved.
        """
        # Another dataset, or resolution, with the same files may have decoded them since.
        table, files = self._index.load(), ["path", "content"]
        if not table.select(files).equals(self._table.select(files)):
            table = self._table
        wanted = np.unique(rows)
        new = wanted[np.asarray(pc.equal(table["status"].take(pa.array(wanted)), "ok"))]
        if len(new):
            table = self._decode(table, new)
        broken = pc.equal(table["status"].take(pa.array(wanted)), "reject")
        return Paired(self.settings, self._index, table) if pc.any(broken).as_py() else self

    def _decode(self, table: pa.Table, rows: NDArray[np.int32]) -> pa.Table:
        """`table` as it is saved: with what decoding `rows` finds, also if it is broken off."""
        tell, stage, total = self._index.bus.emit, f"{self.word}s {self.id}", len(rows)
        faults: list[str | None] = []
        tell(Stage(stage=stage, state="running", total=total))
        try:
            with ThreadPoolExecutor(self._index.workers, thread_name_prefix="paired") as pool:
                for start in range(0, total, CHUNK):
                    faults += pool.map(self._fault, rows[start : start + CHUNK].tolist())
                    done = len(faults)
                    tell(StageProgress(stage=stage, state="running", done=done, total=total))
        finally:
            table = _marked(table, rows[: len(faults)], faults)
            self._index.save(table)
        tell(Stage(stage=stage, state="finished", done=total, total=total))
        return table

    def _fault(self, row: int) -> str | None:
        try:
            self.image(row)
        except PictureError as error:
            return error.reason
        return None

    def digest(self, rows: NDArray[np.int32], keys: Keys) -> str:
        """Changes when a picture's file does.

        Args:
            rows: [n] the number of each picture's file.
            keys: [n] of the pictures; they count in this order.
        """
        words = self.contents(rows).view(">u8").reshape(-1, 2).astype("<u8")
        order = np.lexsort((words[:, 1], words[:, 0], keys))
        return f"{key64(words[order].tobytes()):016x}"

    def contents(self, rows: NDArray[np.int32]) -> NDArray[np.void]:
        """[k] void of 16 bytes, the digests of some files."""
        return bytes16(self._table["content"].take(pa.array(rows)))

    def image(self, row: int) -> Image.Image:
        """One file, upright, in mode RGB; a mask in mode L, white where its picture is learned.

        What is transparent in a mask counts as black, a colour as the grey that is as bright.

        Raises:
            PictureError: It cannot be read or decoded.
            DataError: It is not the file that was indexed.
        """
        return self.opened(self.path(row), self._table["content"][row].as_py().hex())

    def path(self, row: int) -> str:
        """The relative path of one file."""
        found: str = self._table["path"][row].as_py()
        return found

    def opened(self, path: str, content: str) -> Image.Image:
        """What `image` gives of the file at `path` with the digest `content`, 32 hex digits."""
        where = f"dataset {self.id}: {path}"
        data = self._index.read(path, content, where)
        try:
            if self.kind == "mask":
                return decode(data, _BLACK).convert("L")
            return decode(data, background(self.settings))
        except PictureError as error:
            raise PictureError(error.reason, where) from error


def _marked(table: pa.Table, rows: NDArray[np.int32], faults: Sequence[str | None]) -> pa.Table:
    """`table` with what decoding `rows` found."""
    why = pa.nulls(len(table), pa.string())
    decoded = np.zeros(len(table), np.bool_)
    decoded[rows] = True  # in their order, for they are sorted
    why = pc.replace_with_mask(why, pa.array(decoded), pa.array(faults, pa.string()))
    status = pc.if_else(pc.is_valid(why), "reject", _WHOLE)
    return marked(table, pa.array(decoded), status, why)


def _shown(table: pa.Table) -> pa.ChunkedArray:
    """``64x128`` for each picture."""
    width, height = (table[name].cast(pa.string()) for name in ("width", "height"))
    return pc.binary_join_element_wise(width, height, "x")


def _alike(files: pa.Table, pictures: pa.Table) -> pa.Array:
    """[n] true where a file has the shape of its picture, but for a pixel of the smaller one."""
    ours, theirs = _sides(files), _sides(pictures)
    off = np.abs(ours[:, 0] * theirs[:, 1] - ours[:, 1] * theirs[:, 0])
    return pa.array(off <= np.maximum(ours, theirs).max(axis=1))


def _sides(table: pa.Table) -> Sizes:
    """[n, 2] width and height, 0 where they are not known."""
    columns = [pc.fill_null(table[name], 0) for name in ("width", "height")]
    return sizes_of(pa.table(columns, ["width", "height"]))
