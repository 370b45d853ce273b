"""The masks of a dataset's pictures: files that are white where something is learned."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from simpletuner.core.events import Bus
from simpletuner.core.files import safe_name
from simpletuner.core.seeds import key64
from simpletuner.data.columns import bytes16
from simpletuner.data.geometry import Keys
from simpletuner.data.index import Index
from simpletuner.data.pairing import pair
from simpletuner.data.pixels import PictureError, decode
from simpletuner.data.settings import DatasetSettings
from simpletuner.data.storage.local import LocalStorage

_BLACK = (0, 0, 0)


class Masks:
    """The m masks of one conditioning dataset; build it with `open`.

    Attributes:
        id: Its name.
    """

    def __init__(self, name: str, index: Index, table: pa.Table) -> None:
        self.id = name
        self._index = index
        self._table = table

    @classmethod
    def open(cls, settings: DatasetSettings, *, index_folder: Path, bus: Bus) -> Masks:
        """Scan the masks, looking only at what has changed since the last time.

        Raises:
            DataError: The folder is missing.
        """
        assert settings.instance_data_dir is not None, "checked with the settings"
        index = Index(
            index_folder / f"{safe_name(settings.id)}.parquet",
            LocalStorage(settings.instance_data_dir),
            workers=min(settings.max_workers, os.cpu_count() or 1),
            bus=bus,
            title=f"index {settings.id}",
        )
        return cls(settings.id, index, index.scan(texts=False))

    def beside(self, table: pa.Table) -> tuple[pa.Table, list[str]]:
        """Find the mask of each picture.

        Args:
            table: Of n pictures.

        Returns:
            `table` with two more columns, mask, the number of each picture's mask, and mask_reason,
            why there is none that can be used, one of which is null; and the paths of the masks
            that belong to no picture.
        """
        pairs = pair(table["path"], self._table["path"])
        rows = pa.array(pairs.rows, mask=pairs.rows < 0)
        found = self._table.select(["path", "status", "reason"]).take(rows)
        mask = pc.binary_join_element_wise("its mask", found["path"], " ")
        broken = pc.binary_join_element_wise(mask, found["reason"], ": ")
        lacking = pc.if_else(pa.array(pairs.several), "several masks", "no mask")
        lacking = pc.binary_join_element_wise(lacking, f"in {self.id}", " ")
        good = pc.fill_null(pc.equal(found["status"], "ok"), False)
        why = pc.if_else(pc.is_null(rows), lacking, broken)
        for name, values, there in (("mask", rows, good), ("mask_reason", why, pc.invert(good))):
            nothing = pa.scalar(None, values.type)
            table = table.append_column(name, pc.if_else(there, values, nothing))
        return table, pairs.alone.to_pylist()

    def digest(self, rows: NDArray[np.int32], keys: Keys) -> str:
        """Changes when a picture's mask does.

        Args:
            rows: [n] the number of each picture's mask.
            keys: [n] of the pictures; they count in this order.
        """
        content = bytes16(self._table["content"].take(pa.array(rows)))
        words = content.view(">u8").reshape(-1, 2).astype("<u8")
        order = np.lexsort((words[:, 1], words[:, 0], keys))
        return f"{key64(words[order].tobytes()):016x}"

    def image(self, row: int) -> Image.Image:
        """One mask, upright; mode L, white where its picture is learned.

        What is transparent in it counts as black; of colours, red counts.

        Raises:
            PictureError: It cannot be read or decoded.
            DataError: It is not the file that was indexed.
        """
        path, content = (self._table[name][row].as_py() for name in ("path", "content"))
        where = f"dataset {self.id}: {path}"
        data = self._index.read(path, content.hex(), where)
        try:
            return decode(data, _BLACK).getchannel("R")
        except PictureError as error:
            raise PictureError(error.reason, where) from error
