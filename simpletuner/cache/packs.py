"""One pack: a safetensors file written as a stream.

    <stem>.partial          being written, or left by a kill; never read by others
    <stem>.safetensors      sealed: the truth
    <stem>.parquet          where each entry lies: `simpletuner.cache.parts`
    <stem>.<key>.damaged    a reader found that entry damaged: it counts as missing

The header has a fixed size and is written last, so nothing is gathered in memory for its sake. The
tensors of an entry lie side by side, each at a multiple of 64 in the file; filler tensors named
``~<offset>`` close the gaps, for safetensors refuses a file with a hole. Readers never parse the
header: offsets come from the part.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from zlib import crc32

import torch

from simpletuner.cache.disk import Descriptor
from simpletuner.core.files import fsync_folder

HEADER_BYTES = 1 << 20
ALIGNMENT = 64
PACK, PART, PARTIAL, DAMAGED = ".safetensors", ".parquet", ".partial", ".damaged"
KEY_BYTES = 16

DTYPES = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
"""Safetensors' names of the dtypes an entry may hold."""

_NAMES = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})
METADATA = MappingProxyType({"format": "pt", "cache": "1"})
_OPENING = f'{{"__metadata__":{json.dumps(dict(METADATA), separators=(",", ":"))}'


def damage_mark(name: str) -> tuple[str, bytes] | None:
    """The pack (its stem) and key of the entry that a file's name marks as damaged, else None."""
    stem, _, digits = name.removesuffix(DAMAGED).rpartition(".")
    if not stem or not name.endswith(DAMAGED):
        return None
    try:
        return stem, bytes.fromhex(digits)
    except ValueError:  # another file that happens to end like one
        return None


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies inside an entry."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Its length in bytes."""
        return prod(self.shape) * int(self.dtype.itemsize)


Layout = tuple[Slot, ...]


def layout_text(layout: Layout) -> str:
    """`layout` as the JSON stored in a part: [[tensor, dtype, shape, offset in the entry], …]."""
    rows = [[s.name, _NAMES[s.dtype], list(s.shape), s.offset] for s in layout]
    return json.dumps(rows, separators=(",", ":"))


def parse_layout(text: str) -> Layout:
    """The inverse of `layout_text`."""
    return tuple(
        Slot(n, DTYPES[d], tuple(shape), offset) for n, d, shape, offset in json.loads(text)
    )


@dataclass(frozen=True)
class Entry:
    """One line of a part: `offset` is absolute in the pack, `crc` covers `nbytes` from there."""

    key: bytes
    offset: int
    nbytes: int
    layout: str
    crc: int


@dataclass(frozen=True)
class Limits:
    """When a pack is sealed; a full header seals it as well.

    Args:
        pack_bytes: Bytes of tensors; a larger single entry gets a pack of its own.
        tensors: Tensors, fillers included: more of them make the header slow to open elsewhere.
        seconds: Age: what a kill can cost a slow encoder.
    """

    pack_bytes: int = 256 * 10**6
    tensors: int = 8192
    seconds: float = 120.0


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype; writing to it writes to the tensor."""
    flat = tensor.detach().view(-1).view(torch.uint8)
    return memoryview(flat.numpy())


@dataclass(frozen=True)
class Parcel:
    """An entry ready to be written: its tensors laid side by side, its checksum taken."""

    key: bytes
    layout: Layout
    tensors: tuple[torch.Tensor, ...]
    nbytes: int
    crc: int

    @classmethod
    def of(cls, key: bytes, tensors: Mapping[str, torch.Tensor]) -> Parcel:
        """Lay out `tensors`; those on a device are copied, those on the CPU are not."""
        layout, held, end, crc = [], [], 0, 0
        for name, tensor in tensors.items():
            ours = tensor.detach().cpu().contiguous()
            start = _align(end)
            layout.append(Slot(name, ours.dtype, tuple(ours.shape), start))
            held.append(ours)
            crc = crc32(tensor_bytes(ours), crc32(bytes(start - end), crc))
            end = start + ours.nbytes
        return cls(key, tuple(layout), tuple(held), end, crc)


class PackWriter:
    """A pack being written.

    Args:
        folder: Must exist.
        stem: Unique: a pack is never written over.
        limits: When `add` refuses.
        gather: Entries held back so that one call writes them all.
    """

    gather_bytes = 64 * 10**6

    def __init__(self, folder: Path, stem: str, limits: Limits, gather: int) -> None:
        self.folder, self.stem, self.limits, self.gather = folder, stem, limits, gather
        self.path = folder / f"{stem}{PARTIAL}"
        self.entries: list[Entry] = []
        self.opened = time.monotonic()
        self.descriptor = Descriptor(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._end = HEADER_BYTES
        self._header = [_OPENING]
        self._header_bytes = len(_OPENING) + 1
        self._waiting: list[torch.Tensor | int] = []  # an int is that many bytes of filler
        self._waiting_entries = 0
        self._written = HEADER_BYTES

    @property
    def due(self) -> bool:
        """True if the pack is old enough to be sealed."""
        return time.monotonic() - self.opened >= self.limits.seconds

    def add(self, parcel: Parcel) -> Entry | None:
        """Append an entry, or return None if the pack is full.

        Raises:
            ValueError: Not even an empty pack could take it.
            OSError: The disk refused.
        """
        start = _align(self._end)
        lines = [_filler(self._end, start)] if start > self._end else []
        pieces: list[torch.Tensor | int] = [start - self._end] if lines else []
        end = start
        for slot, tensor in zip(parcel.layout, parcel.tensors, strict=True):
            place = start + slot.offset
            if place > end:
                lines.append(_filler(end, place))
                pieces.append(place - end)
            end = place + slot.nbytes
            name = f"{parcel.key.hex()}.{slot.name}"
            lines.append(_line(name, _NAMES[slot.dtype], slot.shape, place, end))
            pieces.append(tensor)
        if not self._room(lines, end):
            if not self.entries:
                raise ValueError(f"an entry of {len(lines)} tensors does not fit a pack's header")
            return None
        entry = Entry(parcel.key, start, parcel.nbytes, layout_text(parcel.layout), parcel.crc)
        self.entries.append(entry)
        self._header += lines
        self._header_bytes += sum(len(line) + 1 for line in lines)
        self._waiting += pieces
        self._waiting_entries += 1
        self._end = end
        if self._waiting_entries >= self.gather or end - self._written >= self.gather_bytes:
            self.flush()
        return entry

    def _room(self, lines: Sequence[str], end: int) -> bool:
        header = self._header_bytes + sum(len(line) + 1 for line in lines)
        tensors = len(self._header) - 1 + len(lines)
        if header > HEADER_BYTES - 8 or tensors > self.limits.tensors:
            return False
        return not self.entries or end - HEADER_BYTES <= self.limits.pack_bytes

    def flush(self) -> None:
        """Write what is held back."""
        zeros = memoryview(bytes(ALIGNMENT))
        views = [zeros[:x] if isinstance(x, int) else tensor_bytes(x) for x in self._waiting]
        self.descriptor.write(views, self._written)
        self._waiting, self._waiting_entries, self._written = [], 0, self._end

    def seal(self) -> Path:
        """Write the header and make the pack durable under its name.

        Raises:
            OSError: The disk refused; the ``.partial`` stays.
        """
        self.flush()
        text = (",".join(self._header) + "}").encode()
        header = (HEADER_BYTES - 8).to_bytes(8, "little") + text.ljust(HEADER_BYTES - 8)
        self.descriptor.write([memoryview(header)], 0)
        os.fsync(self.descriptor.number)
        sealed = self.folder / f"{self.stem}{PACK}"
        self.path.rename(sealed)
        self.path = sealed
        fsync_folder(self.folder)
        return sealed


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _line(name: str, dtype: str, shape: Sequence[int], start: int, end: int) -> str:
    """One tensor's line in the header; `start` and `end` are absolute in the file."""
    offsets = [start - HEADER_BYTES, end - HEADER_BYTES]
    value = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
    return f"{json.dumps(name)}:{json.dumps(value, separators=(',', ':'))}"


def _filler(start: int, end: int) -> str:
    return _line(f"~{start}", "U8", [end - start], start, end)
