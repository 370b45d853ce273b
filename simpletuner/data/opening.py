"""All datasets of a run, scanned, each with what belongs to it."""

from __future__ import annotations

from pathlib import Path

from simpletuner.core.events import Bus
from simpletuner.data.settings import Datasets
from simpletuner.data.source import DataSource


def open_sources(
    datasets: Datasets, *, index_folder: Path, train_batch_size: int, bus: Bus
) -> list[DataSource]:
    """All sets of pictures: what is trained on, in the order of the datasets file, then the rest.

    Args:
        datasets: The entries, inherited values filled in.
        index_folder: Where the indexes are kept.
        train_batch_size: Of the run.
        bus: Told of progress and of what is left out.

    Raises:
        DataError: One of them cannot be used.
    """
    return [
        DataSource.open(
            entry,
            index_folder=index_folder,
            train_batch_size=train_batch_size,
            paired=datasets.paired.get(entry.id, ()),
            index_name=datasets.indexes.get(entry.id),
            bus=bus,
        )
        for entry in datasets.pictures
    ]
