"""The columns of an index, and some of them as numpy arrays; n rows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from simpletuner.data.geometry import Keys, Sizes

FILE_COLUMNS = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("content", pa.binary(16)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("alpha", pa.bool_()),
        ("frames", pa.bool_()),
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
)
TEXT_COLUMNS = pa.schema(
    [
        ("caption_size", pa.int64()),
        ("caption_mtime_ns", pa.int64()),
        ("caption_shared", pa.bool_()),
        ("caption", pa.large_string()),
        ("caption_reason", pa.string()),
    ]
)
COLUMNS = pa.schema([*FILE_COLUMNS, *TEXT_COLUMNS])


def kept(table: pa.Table, keep: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The rows to keep; no copy where these are all."""
    return table if pc.all(keep).as_py() else table.filter(keep)


def sizes_of(table: pa.Table) -> Sizes:
    """[n, 2] width and height."""
    columns = [table[name].to_numpy().astype(np.int64) for name in ("width", "height")]
    return np.stack(columns, axis=1)


def keys_of(content: NDArray[np.void]) -> Keys:
    """[n] the first 8 bytes of each digest."""
    return content.view(">u8").reshape(-1, 2)[:, 0].astype(np.uint64)


def bytes16(column: pa.ChunkedArray) -> NDArray[np.void]:
    """[n] void of 16 bytes: numpy's own byte strings would lose zeros at the end."""
    packed = column.combine_chunks()
    data = np.frombuffer(packed.buffers()[1], "V16")
    found: NDArray[np.void] = data[packed.offset : packed.offset + len(packed)]
    return found
