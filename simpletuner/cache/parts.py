"""The index part of a pack: where each entry lies; derived, and rebuilt from the pack's header."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import pyarrow as pa
import pyarrow.parquet as pq

from simpletuner.cache.disk import Descriptor
from simpletuner.cache.packs import (
    DTYPES,
    HEADER_BYTES,
    KEY_BYTES,
    METADATA,
    Entry,
    Slot,
    layout_text,
)
from simpletuner.core.errors import CacheError
from simpletuner.core.files import write_through

_FORMAT = "1"
_SCHEMA = pa.schema(
    [
        ("key", pa.binary(KEY_BYTES)),
        ("offset", pa.int64()),
        ("nbytes", pa.int64()),
        ("layout", pa.dictionary(pa.int32(), pa.string())),
        ("crc", pa.uint32()),
    ]
)


class DamagedPackError(CacheError):
    """A pack or its part is not what we wrote; its entries count as missing."""


def as_table(entries: Sequence[Entry]) -> pa.Table:
    """The columns of a part."""
    columns = [
        pa.array([e.key for e in entries], pa.binary(KEY_BYTES)),
        pa.array([e.offset for e in entries], pa.int64()),
        pa.array([e.nbytes for e in entries], pa.int64()),
        pa.array([e.layout for e in entries], pa.string()).dictionary_encode(),
        pa.array([e.crc for e in entries], pa.uint32()),
    ]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def write_part(path: Path, entries: Sequence[Entry]) -> None:
    """Write the part of a pack, whole or not at all."""
    table = as_table(entries).replace_schema_metadata({"pack": path.stem, "format": _FORMAT})
    write_through(
        path,
        lambda temporary: pq.write_table(
            table, temporary, compression="zstd", write_page_checksum=True
        ),
    )


def read_part(path: Path, pack_bytes: int) -> pa.Table:
    """The part at `path` of a pack that is `pack_bytes` long.

    Raises:
        DamagedPackError: It cannot be read, is not this pack's, or the pack has another length.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata = file.schema_arrow.metadata or {}
            table = file.read().cast(_SCHEMA)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DamagedPackError(f"cannot be read: {error}") from None
    if metadata.get(b"pack") != path.stem.encode() or metadata.get(b"format") != _FORMAT.encode():
        raise DamagedPackError("belongs to another pack or another version")
    ends = table["offset"].to_numpy() + table["nbytes"].to_numpy()
    if len(ends) and int(ends.max()) != pack_bytes:
        raise DamagedPackError(f"is of a pack of {int(ends.max())} bytes, not of {pack_bytes}")
    return table


def rebuild_entries(path: Path) -> list[Entry]:
    """The entries of a sealed pack, from its header; checksums are taken of what is there.

    Raises:
        DamagedPackError: The header is not one of ours, or the file ends before it should.
    """
    try:
        descriptor = Descriptor(path, os.O_RDONLY)
        return _entries(descriptor, path.stat().st_size)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedPackError(f"its header cannot be used: {error}") from None


def _entries(descriptor: Descriptor, size: int) -> list[Entry]:
    start = bytearray(HEADER_BYTES)
    if not descriptor.read_into([memoryview(start)], 0):
        raise ValueError("the file ends inside it")
    if int.from_bytes(start[:8], "little") != HEADER_BYTES - 8:
        raise ValueError("its length is not ours")
    header = json.loads(start[8:])
    if header.pop("__metadata__", None) != dict(METADATA):
        raise ValueError("it is of another version")
    placed = sorted((*value["data_offsets"], name) for name, value in header.items())
    ends = [0, *(end for _, end, _ in placed)]
    if [begin for begin, _, _ in placed] != ends[:-1]:
        raise ValueError("its tensors do not lie one after the other")
    if ends[-1] + HEADER_BYTES != size:
        raise ValueError(f"the file is {size} bytes long instead of {ends[-1] + HEADER_BYTES}")
    slots: dict[bytes, list[Slot]] = {}
    for begin, _, name in placed:
        if name.startswith("~"):
            continue
        key, _, tensor = name.partition(".")
        value = header[name]
        slot = Slot(tensor, DTYPES[value["dtype"]], tuple(value["shape"]), begin + HEADER_BYTES)
        slots.setdefault(bytes.fromhex(key), []).append(slot)
    return [_entry(descriptor, key, found) for key, found in slots.items()]


def _entry(descriptor: Descriptor, key: bytes, slots: Sequence[Slot]) -> Entry:
    offset = slots[0].offset
    nbytes = max(s.offset + s.nbytes for s in slots) - offset
    data = bytearray(nbytes)
    if not descriptor.read_into([memoryview(data)], offset):
        raise ValueError("the file ends inside an entry")
    layout = tuple(Slot(s.name, s.dtype, s.shape, s.offset - offset) for s in slots)
    return Entry(key, offset, nbytes, layout_text(layout), crc32(data))
