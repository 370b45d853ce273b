"""Metadata tables as files: CSV, JSON, JSON lines, Parquet; only what is asked for is kept."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, getincrementaldecoder
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from simpletuner.core.errors import DataError
from simpletuner.core.text import printable
from simpletuner.data.storage.base import PICTURE_SUFFIXES

BLOCK_BYTES = 1 << 24
"""No row of a CSV table is longer."""


@dataclass(frozen=True)
class TableFile:
    """Some columns of a table.

    Args:
        columns: Those of the asked ones that there are. Texts as the file has them: text, numbers,
            or lists of text; numbers as float64, null where a cell is none.
        names: Every column of the file.
        encoding: Of its text.
    """

    columns: pa.Table
    names: tuple[str, ...]
    encoding: str = "utf-8"


def read_columns(path: Path, texts: Iterable[str], numbers: Iterable[str] = ()) -> TableFile:
    """Read the columns `texts` and `numbers` of a table, as far as it has them.

    Raises:
        DataError: There is no such file, it is of another kind, or it is damaged.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        *most, last = _READERS
        raise DataError(
            f"the table {path} is of an unknown kind",
            fix=f"use one whose name ends in {', '.join(most)} or {last}",
        )
    if path.is_dir():
        raise DataError(f"the table {path} is a folder", fix="name the file in it that is meant")
    kinds = dict.fromkeys(texts, pa.string()) | dict.fromkeys(numbers, pa.float64())
    try:
        found = reader(path, kinds)
    except FileNotFoundError as error:
        raise DataError(
            f"the table {path} does not exist", fix="correct its path in the dataset's entry"
        ) from error
    except (pa.ArrowException, ValueError, OSError) as error:
        why = printable(str(error))
        fix = _MENDS[path.suffix.lower()]
        raise DataError(f"the table {path} cannot be read: {why}", fix=fix) from error
    for name in kinds:
        if found.names.count(name) > 1:
            raise DataError(f"the table {path} has two columns {name}", fix="rename one of them")
    return found


_MENDS = {
    ".csv": "mend it; in CSV a text that holds commas, quotes or line feeds stands in double"
    " quotes, and a double quote in it is written twice",
    ".json": "mend it; it is a list of objects, [{…}, {…}], or has an object on each line",
    ".jsonl": "mend it; it has an object, {…}, on each line",
    ".parquet": "write or copy it anew; it is damaged, or no Parquet",
}


def _csv(path: Path, kinds: Mapping[str, pa.DataType]) -> TableFile:
    encoding = _encoding(path)
    table = pa_csv.read_csv(
        path,
        pa_csv.ReadOptions(encoding=encoding, block_size=BLOCK_BYTES),
        pa_csv.ParseOptions(newlines_in_values=True),
        pa_csv.ConvertOptions(column_types=dict.fromkeys(kinds, pa.string())),  # 0012 is not 12
    )
    _refuse_rows_in_cells(table, path)
    names = tuple(table.column_names)
    once = [name for name in kinds if names.count(name) == 1]
    return TableFile(_with_numbers(table.select(once), kinds), names, encoding)


_NAME = rf"[^,\r\n]*\.(?:{'|'.join(sorted(suffix[1:] for suffix in PICTURE_SUFFIXES))})"
_ROW = (
    rf'(?i)[\r\n](?:"?(?:https?://[^\s,]*"?,\S|{_NAME}"?,)[^\r\n]*'
    rf'|[^\r\n]*,"?(?:https?://[^\r\n]*|[^\s,]{_NAME}"?(?:,[^\r\n]*|[\r\n]|$)))'
)
"""A line of a text that reads like a row: begins with a picture's name and a comma, or has one in
a later cell."""


def _refuse_rows_in_cells(table: pa.Table, path: Path) -> None:
    """A quote that is never closed swallows the rows that follow, and their pictures."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        if not pa.types.is_string(column.type):
            continue
        row = pc.index(pc.match_substring_regex(column, _ROW), True).as_py()
        if row < 0:
            continue
        match = re.search(_ROW, column[row].as_py())
        line = printable(match[0].strip() if match else "")[:80]
        raise DataError(
            f"the table {path}: row {row + 1} has another row inside its {name}: {line}",
            fix="close the double quote before it, or write it twice if it belongs to the text;"
            " a text that is meant to have such lines can stand in a .jsonl table",
        )


def _parquet(path: Path, kinds: Mapping[str, pa.DataType]) -> TableFile:
    names = pq.read_schema(path).names
    table = pq.read_table(path, columns=[name for name in kinds if name in names])
    return TableFile(_with_numbers(table, kinds), tuple(names))


def _json(path: Path, kinds: Mapping[str, pa.DataType]) -> TableFile:
    """A list of objects, or an object on each line."""
    encoding = _encoding(path)
    with path.open(encoding=encoding) as file:
        first = file.readline()
    if not first.lstrip().startswith("[") and encoding in ("utf-8", "utf-8-sig"):
        options = pa_json.ParseOptions(pa.schema(kinds.items()), unexpected_field_behavior="ignore")
        try:
            table = pa_json.read_json(path, parse_options=options)
            names = tuple(_object(json.loads(first), 1))
        except ValueError:
            pass  # lists, numbers for texts, or a fault, which the slow way names
        else:
            there = [name for name in kinds if name in names or table[name].null_count < len(table)]
            return TableFile(table.select(there), (*names, *set(there).difference(names)), encoding)
    try:
        return _json_by_hand(path.read_text(encoding=encoding), kinds, encoding)
    except RecursionError:
        raise ValueError("lists and objects lie too deep in each other") from None


def _json_by_hand(text: str, kinds: Mapping[str, pa.DataType], encoding: str) -> TableFile:
    if text.lstrip().startswith("["):
        rows = [_object(row, number) for number, row in enumerate(json.loads(text), 1)]
    else:
        rows = [_line(line, n) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    columns = {
        name: pa.array(
            [_cell(row.get(name), kind, name, number) for number, row in enumerate(rows, 1)],
            pa.list_(kind) if kind == pa.string() else kind,
        )
        for name, kind in kinds.items()
        if name in names
    }
    return TableFile(pa.table(columns), names, encoding)


def _line(line: str, number: int) -> Mapping[str, Any]:
    try:
        return _object(json.loads(line), number)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error.msg} at column {error.colno}") from error


def _object(value: object, number: int) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"row {number} is no object, such as {{…}}")
    return value


def _cell(value: object, kind: pa.DataType, name: str, number: int) -> Sequence[str] | float | None:
    """The value of a row, in the form its column takes."""
    if kind == pa.string():
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, (bool, list, dict)) for item in items):
            shown = printable(json.dumps(value, ensure_ascii=False))[:80]
            raise ValueError(f"row {number}: {name} cannot be {shown}")
        return [str(item) for item in items if item is not None]
    text = str(value).strip()
    return float(text) if re.fullmatch(_NUMBER, text) else None


_NUMBER = r"[0-9]+(\.[0-9]+)?"


def _with_numbers(table: pa.Table, kinds: Mapping[str, pa.DataType]) -> pa.Table:
    for at, name in enumerate(table.column_names):
        if kinds[name] == pa.float64():
            table = table.set_column(at, name, _numbers(table[name]))
    return table


def _numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """float64, null for what is no number: a size that cannot be read is none."""
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return column.cast(pa.float64())
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return pa.chunked_array([pa.nulls(len(column), pa.float64())])
    texts = pc.utf8_trim_whitespace(column)
    is_number = pc.match_substring_regex(texts, f"^{_NUMBER}$")
    return pc.if_else(is_number, texts, pa.scalar(None, kind)).cast(pa.float64())


def _encoding(path: Path) -> str:
    """UTF-8 with or without a mark, UTF-16 with one, else cp1252."""
    decoder = getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        start = file.read(len(BOM_UTF8))
        if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            return "utf-16"
        try:
            decoder.decode(start)
            while block := file.read(1 << 20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "cp1252"
    return "utf-8-sig" if start == BOM_UTF8 else "utf-8"


_READERS: Mapping[str, Callable[[Path, Mapping[str, pa.DataType]], TableFile]] = MappingProxyType(
    {".csv": _csv, ".json": _json, ".jsonl": _json, ".parquet": _parquet}
)
