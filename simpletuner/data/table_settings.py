"""Which table says what of a dataset's files: the table keys of the settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator

from simpletuner.core.section import Section, setting
from simpletuner.data.captions import CAPTION_STRATEGIES


def _one_spelling(value: object) -> object:
    return "discovery" if value in ("json", "filesystem") else value


MetadataBackend = Annotated[
    Literal["discovery", "parquet", "huggingface", "webshart"], BeforeValidator(_one_spelling)
]


class TableSettings(Section):
    """What is said once of the tables of all datasets."""

    parquet_caption_column: str | None = setting(None)
    """The column with captions of every `parquet` table that does not name its own."""

    parquet_filename_column: str | None = setting(None)
    """The column with file names of every `parquet` table that does not name its own."""


class ParquetSettings(Section):
    """A table beside a folder of pictures, and its columns."""

    path: Path = setting(path=True)
    """Its file: .parquet, .csv, .json or .jsonl."""

    filename_column: str = setting("id")
    """The column that names files: paths in the folder of the pictures, or names alone, which mean
    such a file in any folder."""

    caption_column: str | tuple[str, ...] = setting("description")
    """The column with captions; of several, a picture has the captions of all. A cell may be a list
    of captions, of which each visit draws one."""

    fallback_caption_column: str | None = setting(None)
    """The column that stands in where caption_column is empty."""

    width_column: str | None = setting(None)
    """The column with widths, without it the one called width, if there is such; pictures of
    another size than the table says are named, and the file is right."""

    height_column: str | None = setting(None)
    """The column with heights, without it the one called height, if there is such."""

    identifier_includes_extension: bool = setting(False)
    """Names in the table end as their files do; otherwise a name without its ending will do."""


class DatasetTableSettings(Section):
    """What is said of one dataset's table."""

    metadata_backend: MetadataBackend = setting("discovery", pending=("huggingface", "webshart"))
    """What says which pictures there are: discovery, the folder; parquet, the rows of the table, of
    whatever format it is, so that files without a row are left out. Without it, parquet where there
    is a dataset_metadata_path. Sizes are read from the pictures themselves."""

    dataset_metadata_path: Path | None = setting(None, path=True)
    """A table with a row for each picture: .csv, .json (a list of objects), .jsonl or .parquet. Its
    files are paths in instance_data_dir, without that in the table's own folder, whole paths,
    or http(s) addresses, each of which is fetched once and kept. Captions come from it too, unless
    the entry's own caption_strategy says otherwise; the settings file's is for datasets without
    such a table."""

    data_file_keys: tuple[str, ...] = setting(("image",), min_length=1)
    """The columns of dataset_metadata_path that name files; of several, the first that a row fills
    is trained on."""

    caption_column: str | tuple[str, ...] = setting("prompt")
    """The column of dataset_metadata_path with captions; of several, a picture has the captions of
    all. A cell may be a list of captions, of which each visit draws one."""

    dataset_repeat: int | None = setting(None, ge=1, le=1_000_000)
    """How often each picture is seen within an epoch, 1 being once: repeats, counted from one."""

    parquet: ParquetSettings | None = setting(None)
    """A table with captions and sizes for a folder of pictures; captions are taken from it under
    caption_strategy parquet, and its rows say which pictures there are under metadata_backend
    parquet."""

    csv_file: Path | None = setting(None, path=True)
    """The table of addresses and captions, under type csv."""

    csv_url_column: str = setting("url")
    """Its column of addresses."""

    csv_caption_column: str | None = setting(None)
    """Its column of captions."""

    csv_cache_dir: Path | None = setting(None, path=True)
    """The folder that downloads are kept in, which datasets and runs may share; without it, one
    in the caches of the run."""

    @property
    def table_path(self) -> Path | None:
        """The table's file, if the dataset has one."""
        block = self.parquet.path if self.parquet else None
        return self.csv_file or self.dataset_metadata_path or block


def reads_table(caption_strategy: str) -> bool:
    """True if captions come from the dataset's table."""
    return bool(CAPTION_STRATEGIES[caption_strategy].fact("reads_table", False))


def table_defaults(entry: DatasetTableSettings, storage: str) -> dict[str, object]:
    """What follows from an entry's table for keys that the entry does not give.

    Args:
        entry: As the datasets file gives it.
        storage: Its `type`.
    """
    made: dict[str, object] = {}
    path = entry.csv_file if storage == "csv" else entry.dataset_metadata_path
    if path is not None:
        made["metadata_backend"] = "parquet"
        ending = path.suffix.lower().removeprefix(".")
        made["caption_strategy"] = ending if ending in CAPTION_STRATEGIES else "parquet"
    if entry.dataset_repeat is not None:
        made["repeats"] = entry.dataset_repeat - 1
    return made


def inherit_columns(block: ParquetSettings | None, data: TableSettings) -> ParquetSettings | None:
    """`block` with the columns it does not name taken from the settings of the run."""
    if block is None:
        return None
    wider = {
        "filename_column": data.parquet_filename_column,
        "caption_column": data.parquet_caption_column,
    }
    given = block.model_fields_set
    return block.model_copy(update={k: v for k, v in wider.items() if v and k not in given})


def table_contradictions(
    entry: DatasetTableSettings, storage: str, caption_strategy: str
) -> Iterator[tuple[str, str]]:
    """What does not fit together in an entry with inherited values: a key, and what to do."""
    needs = "dataset_metadata_path (or parquet): the table"
    tables = {
        "csv_file": entry.csv_file is not None,
        "dataset_metadata_path": entry.dataset_metadata_path is not None,
        "parquet": entry.parquet is not None,
    }
    there = [key for key, given in tables.items() if given]
    reads, rows_decide = reads_table(caption_strategy), entry.metadata_backend == "parquet"
    if len(there) > 1:
        yield there[0], f"and {there[1]} are two tables for one dataset; keep one of them"
    if storage == "csv":
        if entry.csv_file is None:
            yield "type", "csv needs csv_file: the table of addresses"
        elif reads and entry.csv_caption_column is None:
            yield "csv_file", "needs csv_caption_column: its column of captions"
        elif not rows_decide:
            yield "metadata_backend", "discovery has no folder to look into under type csv"
    elif entry.csv_file is not None:
        yield "csv_file", "is read under type csv only; set it, or use dataset_metadata_path"
    elif not there:
        if reads:
            yield "caption_strategy", f"{caption_strategy} needs {needs}"
        if rows_decide:
            yield "metadata_backend", f"parquet needs {needs}"
    elif not reads and not rows_decide:
        yield there[0], "changes nothing; set caption_strategy or metadata_backend to parquet"
    given = entry.model_fields_set
    if entry.dataset_metadata_path is None:
        for key in ("data_file_keys", "caption_column"):
            if key in given:
                yield key, "is of dataset_metadata_path, which is not given"
