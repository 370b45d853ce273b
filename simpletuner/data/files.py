"""The files a dataset's settings mean, and the table that says more of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from simpletuner.core.events import Bus
from simpletuner.data.metadata import MetadataTable
from simpletuner.data.rules import table_rule
from simpletuner.data.settings import DatasetSettings
from simpletuner.data.storage.base import Storage
from simpletuner.data.storage.listed import ListedStorage
from simpletuner.data.storage.local import LocalStorage
from simpletuner.data.storage.web import SCHEMES, WebStorage


@dataclass(frozen=True)
class DatasetFiles:
    """Where the files of a dataset lie, and what is known of them beforehand.

    Args:
        storage: Where.
        workers: Threads that it pays to read it with.
        table: What says more of them.
        unlisted: How many files of the folder the table does not name.
        example: One of these.
    """

    storage: Storage
    workers: int
    table: MetadataTable | None = None
    unlisted: int = 0
    example: str = ""


def open_files(settings: DatasetSettings, *, downloads: Path, bus: Bus) -> DatasetFiles:
    """The files of a dataset.

    Args:
        settings: Of the dataset.
        downloads: Where pictures from the web are kept, unless the settings say otherwise.
        bus: Told of rows that cannot be used.

    Raises:
        DataError: The folder cannot be listed, or the table cannot be read.
    """
    # More threads than cores do not read a disk faster; the web is waited for.
    few = min(settings.max_workers, os.cpu_count() or 1)
    rule = table_rule(settings)
    if rule is None:
        assert settings.instance_data_dir is not None, "checked with the settings"
        return DatasetFiles(LocalStorage(settings.instance_data_dir), few)
    table = MetadataTable.read(rule, bus)
    folder = LocalStorage(settings.instance_data_dir or rule.path.parent)
    if settings.metadata_backend != "parquet":
        return DatasetFiles(folder, few, table)
    members = table.members(folder.keys() if table.has_paths else [])
    urls = [name for name in members.names if name.startswith(SCHEMES)]
    return DatasetFiles(
        ListedStorage(
            members.names,
            folder,
            WebStorage(urls, settings.csv_cache_dir or downloads),
            str(rule.path),
        ),
        settings.max_workers if urls else few,
        table,
        len(members.unlisted),
        min(members.unlisted, default=""),
    )
