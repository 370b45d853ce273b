"""The metadata table of a dataset: which files it names, and what it says of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from simpletuner.core.errors import DataError, did_you_mean
from simpletuner.core.events import Bus
from simpletuner.core.text import printable
from simpletuner.data.captions import SEPARATOR
from simpletuner.data.metadata_files import TableFile, read_columns
from simpletuner.data.storage.base import is_text
from simpletuner.data.storage.web import SCHEMES

Rows = NDArray[np.int64]

NONE = -1
"""In the place of a row where there is none."""


@dataclass(frozen=True)
class TableRule:
    """What is read of a table, and how its rows and the files find each other.

    Args:
        path: Its file.
        files: Columns that name files; of these, the first that a row fills counts.
        captions: Columns with captions; a row has all of theirs.
        fallback: The column that stands in where these are empty.
        width: The column with widths; None for one called width, if there is such.
        height: The same for heights.
        endings: Names end as their files do; otherwise they need not.
        anywhere: A name without a folder means such a file in any folder.
        files_key: The setting that names `files`, for messages.
        captions_key: The same for `captions`.
    """

    path: Path
    files: tuple[str, ...]
    captions: tuple[str, ...] = ()
    fallback: str | None = None
    width: str | None = None
    height: str | None = None
    endings: bool = True
    anywhere: bool = False
    files_key: str = "data_file_keys"
    captions_key: str = "caption_column"


@dataclass(frozen=True)
class Members:
    """What a table makes of the files of a folder.

    Args:
        names: The files it names, and what it names that is none of them.
        unlisted: Files that it does not name.
    """

    names: list[str]
    unlisted: list[str]


class MetadataTable:
    """The rows of a table, sorted by the file they name, each file once.

    Attributes:
        rule: What was read.
        files: [n] the names as they stand in the table.
        captions: [n] their captions with SEPARATOR between, null where there is none.
        sizes: [n, 2] float64 width and height, NaN where the table does not say.
    """

    def __init__(
        self, rule: TableRule, files: pa.Array, captions: pa.Array, sizes: NDArray[np.float64]
    ) -> None:
        self.rule = rule
        self.files = files
        self.captions = captions
        self.sizes = sizes
        self._names = (files, pc.replace_substring(files, "\\", "/"))  # as Windows writes paths

    @classmethod
    def read(cls, rule: TableRule, bus: Bus) -> MetadataTable:
        """Read the table.

        Args:
            rule: What of it.
            bus: Told of rows that cannot be used.

        Raises:
            DataError: It cannot be read, or lacks a column, or names no file.
        """
        wanted = (*rule.captions, *filter(None, [rule.fallback]))
        sizes = (rule.width or "width", rule.height or "height")
        file = read_columns(rule.path, (*rule.files, *wanted), sizes)
        if file.encoding == "cp1252":
            bus.notice(f"{rule.path} is not UTF-8, read as cp1252", "warning")
        if not any(name in file.names for name in rule.files):
            raise _lacks(rule, file, rule.files[0], rule.files_key)
        for name in wanted:
            if name not in file.names:
                raise _lacks(rule, file, name, rule.captions_key)
        for size, key in ((rule.width, "width_column"), (rule.height, "height_column")):
            if size is not None and size not in file.names:
                raise _lacks(rule, file, size, key)
        return cls(rule, *_sorted(*_rows(rule, file, sizes, bus), rule, bus))

    @property
    def has_paths(self) -> bool:
        """True if some row names a file that is not on the web."""
        return len(self.files) > self.count_urls()

    def count_urls(self) -> int:
        """How many rows name a web address."""
        return pc.sum(_is_url(self.files)).as_py() or 0

    def rows_of(self, paths: pa.Array) -> Rows:
        """[n] the row of each of `paths`, NONE for those that have none."""
        found = np.full(len(paths), NONE)
        for form in self._forms(paths):
            for names in self._names:
                at = pc.index_in(form, value_set=names).fill_null(NONE)
                found = np.where(found == NONE, at.to_numpy(zero_copy_only=False), found)
        return found

    def captions_of(self, paths: pa.Array) -> pa.Array:
        """[n] large_string: the captions of each of `paths`, null for none."""
        rows = self.rows_of(paths)
        return self.captions.take(pa.array(rows, mask=rows == NONE))

    def members(self, listing: Sequence[str]) -> Members:
        """Which files of a folder are meant, and what else is named.

        Args:
            listing: Every picture of the folder.
        """
        paths = pa.array(filter(is_text, listing), pa.string())
        rows = self.rows_of(paths)
        meant = pa.array(rows != NONE)
        missing = np.ones(len(self.files), np.bool_)
        missing[rows[rows != NONE]] = False
        named = paths.filter(meant).to_pylist() + self.files.filter(pa.array(missing)).to_pylist()
        unlisted = paths.filter(pc.invert(meant)).to_pylist()
        return Members(named, unlisted + [key for key in listing if not is_text(key)])

    def tell_other_sizes(self, index: pa.Table, bus: Bus) -> None:
        """Say how many pictures of an index are not of the size that the table says."""
        rows = self.rows_of(index["path"].combine_chunks())
        said = np.where((rows != NONE)[:, None], self.sizes[rows], np.nan)
        found = np.stack([index[name].to_numpy() for name in ("width", "height")], axis=1)
        known = ~np.isnan(said).any(axis=1) & ~np.isnan(found.astype(np.float64)).any(axis=1)
        # What is turned by its orientation may be told either way.
        turned = (said == found[:, ::-1]).all(axis=1)
        others = np.flatnonzero(known & ~turned & (said != found).any(axis=1)).tolist()
        if others:
            path = printable(index["path"][others[0]].as_py())
            sizes = (f"{w:g}x{h:g}" for w, h in (said[others[0]], found[others[0]]))
            bus.notice(
                f"{self.rule.path}: {len(others)} files are not of the size it says, such as {path}"
                f" ({' there, '.join(sizes)} in truth); what is in the files counts",
                "warning",
            )

    def _forms(self, paths: pa.Array) -> Iterator[pa.Array]:
        """What may stand in the table for each of `paths`, the exact first."""
        whole = pc.utf8_normalize(paths, "NFC")
        yield whole
        if not self.rule.endings:
            yield _stems(whole)
        if self.rule.anywhere:
            bare = pc.replace_substring_regex(whole, "^.*/", "")
            yield bare
            if not self.rule.endings:
                yield _stems(bare)


def _stems(paths: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(paths, r"\.[^./]*$", "")


def _is_url(names: pa.Array) -> pa.Array:
    http, https = (pc.starts_with(names, scheme) for scheme in SCHEMES)
    return pc.or_(http, https)


def _has_login(names: pa.Array) -> pa.Array:
    return pc.match_substring_regex(names, "^https?://[^/?#]*@")


def _leads_out(names: pa.Array) -> pa.Array:
    dots = pc.match_substring_regex(names, r"(^|[/\\])\.\.([/\\]|$)")
    return pc.and_(dots, pc.invert(_is_url(names)))


def _lacks(rule: TableRule, file: TableFile, name: str, key: str) -> DataError:
    near = did_you_mean(name, file.names)
    return DataError(
        f"the table {rule.path} has no column {name}{near}; it has {', '.join(file.names)}",
        fix=f"name one of them with {key} in the dataset's entry",
    )


def _rows(
    rule: TableRule, file: TableFile, size_names: tuple[str, str], bus: Bus
) -> tuple[pa.Array, pa.Array, NDArray[np.float64]]:
    """Name, captions and size of each row that names a file, in the order of the table."""
    columns = file.columns
    count = len(columns)
    present = [name for name in rule.files if name in file.names]
    texts = {name: _texts(columns[name], rule.path) for name in (*present, *rule.captions)}
    names = pc.coalesce(*(texts[name] for name in present))
    if pc.any(pc.match_substring(names, SEPARATOR)).as_py():
        raise DataError(
            f"the table {rule.path}: a row of {', '.join(present)} names several files",
            fix=f"choose a column with one file in each row as {rule.files_key}",
        )
    named = pc.index(_has_login(names), True).as_py()
    if named >= 0:
        raise DataError(
            f"the table {rule.path}: the address in row {named + 1} begins with a name or password,"
            " NAME:PASSWORD@, which downloads do not send",
            fix="remove it, or download the files and name them instead; passwords do not belong"
            " in tables",
        )
    outside = pc.index(_leads_out(names), True).as_py()
    if outside >= 0:
        raise DataError(
            f"the table {rule.path}: row {outside + 1} names {printable(names[outside].as_py())},"
            " which does not lie in the dataset's folder",
            fix="write it as it is inside the folder, or whole from the root on; or take a folder"
            " above as instance_data_dir",
        )
    for name in present[1:]:
        unused = pc.sum(pc.and_(pc.is_valid(texts[name]), pc.not_equal(names, texts[name]))).as_py()
        if unused:
            bus.notice(f"{rule.path}: {unused} files of the column {name} are not used", "warning")
    captions = _together([texts[name] for name in rule.captions], count)
    if rule.fallback:
        captions = pc.coalesce(captions, _texts(columns[rule.fallback], rule.path))
    sizes = np.full((count, 2), np.nan)
    for at, name in enumerate(size_names):
        if name in file.names:
            sizes[:, at] = columns[name].to_numpy()
    there = pc.is_valid(names)
    empty = np.flatnonzero(~there.to_numpy(zero_copy_only=False))
    if len(empty) == count:
        raise DataError(
            f"the table {rule.path} names no file in {', '.join(present)}",
            fix=f"name another column with {rule.files_key} in the dataset's entry",
        )
    if len(empty):
        rows = ", ".join(str(row + 1) for row in empty[:10].tolist())
        bus.notice(f"{rule.path}: {len(empty)} rows name no file, such as row {rows}", "warning")
    names = pc.replace_substring_regex(names.filter(there), r"^(\./)+", "").cast(pa.string())
    return names, captions.filter(there), sizes[there.to_numpy(zero_copy_only=False)]


def _sorted(
    names: pa.Array, captions: pa.Array, sizes: NDArray[np.float64], rule: TableRule, bus: Bus
) -> tuple[pa.Array, pa.Array, NDArray[np.float64]]:
    """The rows by name, each once; the captions of a file's rows become alternatives."""
    table = pa.table(
        {"file": names, "caption": captions, "width": sizes[:, 0], "height": sizes[:, 1]}
    ).sort_by([(name, "ascending") for name in ("file", "caption", "width", "height")])
    names = table["file"].combine_chunks()
    first = np.ones(len(names), np.bool_)
    first[1:] = pc.not_equal(names[1:], names[:-1]).to_numpy(zero_copy_only=False)
    captions = table["caption"].combine_chunks()
    if not first.all():
        again = np.flatnonzero(~first)
        example = printable(names[int(again[0])].as_py())
        bus.notice(
            f"{rule.path}: {len(np.unique(np.cumsum(first)[again]))} files stand in several rows,"
            f" such as {example}: each is one picture, with the captions of all",
            "warning",
        )
        new = first.copy()  # what a file has in two rows counts once
        new[1:] |= pc.not_equal(captions[1:], captions[:-1]).fill_null(True).to_numpy(False)
        owners = np.cumsum(first) - 1
        captions = _joined(captions.filter(pa.array(new)), owners[new], int(first.sum()))
    sizes = np.stack([table[name].to_numpy() for name in ("width", "height")], axis=1)
    return names.filter(pa.array(first)), captions, sizes[first]


def _together(columns: Sequence[pa.Array], count: int) -> pa.Array:
    """[n] the texts of several columns as one, null where all are."""
    made = pa.nulls(count, pa.large_string())
    for column in columns:
        # Null where either is; with null_handling, Arrow 26 loses rows of nothing but nulls.
        both = pc.binary_join_element_wise(made, column, pa.scalar(SEPARATOR, pa.large_string()))
        made = pc.coalesce(both, made, column)
    return made


def _texts(column: pa.ChunkedArray, path: Path) -> pa.Array:
    """[n] large_string: what the cells say, null where nothing; SEPARATOR between several."""
    made = [_texts_of(chunk, path) for chunk in column.chunks]
    return pa.concat_arrays(made) if made else pa.array([], pa.large_string())


def _texts_of(cells: pa.Array, path: Path) -> pa.Array:
    if pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    if pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
        parents = pc.list_parent_indices(cells).to_numpy()
        return _joined(_texts_of(pc.list_flatten(cells), path), parents, len(cells))
    try:
        texts = cells.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"the table {path} holds {cells.type} where text is expected",
            fix="name a column of text, or of lists of text",
        ) from error
    texts = pc.replace_substring_regex(texts, "\r\n?", "\n")
    texts = pc.replace_substring(texts, SEPARATOR, " ")
    return _or_null(pc.utf8_trim_whitespace(pc.utf8_normalize(texts, "NFC")))


def _joined(texts: pa.Array, owners: Rows, count: int) -> pa.Array:
    """[count] large_string: the texts of each owner as one, null where it has none.

    Args:
        texts: [n] large_string.
        owners: [n] ascending, in 0 … count - 1.
        count: How many owners there are.
    """
    told = texts.is_valid()
    owners, texts = owners[told.to_numpy(zero_copy_only=False)], texts.filter(told)
    bounds = np.searchsorted(owners, np.arange(count + 1))
    parts = [pa.array([], pa.large_string())]
    for start in range(0, count, 1 << 16):  # a list of texts holds 2 GB at most
        some = bounds[start : start + (1 << 16) + 1]
        own = texts[some[0] : some[-1]].cast(pa.string())
        lists = pa.ListArray.from_arrays(pa.array(some - some[0], pa.int32()), own)
        parts.append(pc.binary_join(lists, SEPARATOR).cast(pa.large_string()))
    return _or_null(pa.concat_arrays(parts))


def _or_null(texts: pa.Array) -> pa.Array:
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.large_string()), texts)
