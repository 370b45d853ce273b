"""Keys of a dataset that change nothing beside its others."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.data.settings import DatasetSettings
from simpletuner.data.table_settings import reads_table

_OF_CSV = ("csv_url_column", "csv_caption_column", "csv_cache_dir")


def without_effect(entry: DatasetSettings) -> Iterator[tuple[str, str]]:
    """A key of an entry with inherited values, and why it changes nothing."""
    puts = entry.prepend_instance_prompt or entry.only_instance_prompt
    if entry.instance_prompt and not puts and entry.caption_strategy != "instanceprompt":
        yield (
            "instance_prompt",
            f"captions come by caption_strategy {entry.caption_strategy}; set"
            " prepend_instance_prompt to put it before them",
        )
    if entry.maximum_image_size and not entry.crop:
        yield "maximum_image_size", "a picture that is not cropped is resized once anyway"
    if entry.target_downsample_size and not (entry.maximum_image_size and entry.crop):
        yield "target_downsample_size", "it is for crops of pictures above maximum_image_size"
    if entry.type != "csv":
        for key in _OF_CSV:
            yield key, f"it is of type csv, and this is {entry.type}"
    if entry.dataset_metadata_path is not None and not reads_table(entry.caption_strategy):
        yield "caption_column", f"captions come by caption_strategy {entry.caption_strategy}"
