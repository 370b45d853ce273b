"""The settings of a dataset: what it inherits, what contradicts, what it may be called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from simpletuner.data.settings import DatasetSettings, DataSettings, contradictions, inherit


def picture_set(**keys: Any) -> DatasetSettings:
    return DatasetSettings(**{"id": "a", "instance_data_dir": "pictures", **keys})


def resolved(data: DataSettings | None = None, **keys: Any) -> DatasetSettings:
    return inherit(picture_set(**keys), data or DataSettings(), vae_root=Path("vae"))


def test_other_spellings_in_a_dataset_mean_the_same() -> None:
    entry = picture_set(
        caption_strategy="instance_prompt", crop_style="centre", metadata_backend="json"
    )
    assert entry.caption_strategy == "instanceprompt"
    assert entry.crop_style == "center"
    assert entry.metadata_backend == "discovery"


def test_a_dataset_inherits_what_it_does_not_say() -> None:
    data = DataSettings(resolution=512, caption_strategy="textfile", caption_dropout_probability=0)
    settings = resolved(data, caption_strategy="filename", caption_dropout_probability=0.1)
    assert settings.resolution == 512
    assert settings.caption_strategy == "filename"
    assert settings.caption_dropout_probability == 0.1
    assert settings.cache_dir_vae == Path("vae/a")


def test_either_place_turns_caching_off() -> None:
    entry = picture_set(vae_cache_ondemand=True)
    settings = inherit(entry, DataSettings(), vae_root=Path("vae"), vae_cache_disable=True)
    assert settings.vae_cache_ondemand
    assert settings.vae_cache_disable


@pytest.mark.parametrize(
    ("keys", "key", "says"),
    [
        ({"maximum_image_size": 1024}, "maximum_image_size", "needs target_downsample_size"),
        ({"resolution_type": "area"}, "resolution", "counts megapixels"),
        ({"resolution": 1.0}, "resolution", "counts px"),
        (
            {"resolution": 1024, "resolution_type": "max_pixels"},
            "resolution",
            "a square of 1024 px has 1048576",
        ),
        ({"resolution": 1048576}, "resolution", "at most 16384, got 1048576; max_pixels counts"),
        ({"resolution": 16385, "resolution_type": "pixel"}, "resolution", "at most 16384"),
        ({"resolution": 1e300, "resolution_type": "area"}, "resolution", "counts megapixels"),
        (
            {"resolution": 1e300, "resolution_type": "max_pixels"},
            "resolution",
            "at most 268435456, the pixels of 16384 x 16384, got 1e+300",
        ),
        ({"minimum_image_size": 1e300}, "minimum_image_size", "at most 16384"),
        ({"crop": True, "crop_aspect": "closest"}, "crop_aspect", "needs crop_aspect_buckets"),
        ({"crop": True, "crop_aspect": "random"}, "crop_aspect", "needs crop_aspect_buckets"),
        (
            {"crop_aspect": "closest", "crop_aspect_buckets": [1]},
            "crop_aspect",
            "closest needs crop true",
        ),
        (
            {"crop_aspect_buckets": [1]},
            "crop_aspect_buckets",
            "closest and random, not square; set one",
        ),
        (
            {
                "crop": True,
                "crop_aspect": "closest",
                "crop_aspect_buckets": [{"aspect": 1, "weight": 1}],
            },
            "crop_aspect_buckets",
            "weight is for crop_aspect random",
        ),
        ({"caption_strategy": "instanceprompt"}, "caption_strategy", "needs instance_prompt"),
        ({"prepend_instance_prompt": True}, "prepend_instance_prompt", "needs instance_prompt"),
        ({"caption_strategy": "jsonl"}, "caption_strategy", "jsonl needs dataset_metadata_path"),
        ({"metadata_backend": "parquet"}, "metadata_backend", "parquet needs dataset_metadata"),
        ({"parquet": {"path": "t"}}, "parquet", "changes nothing; set caption_strategy or"),
        (
            {"dataset_metadata_path": "t.csv", "parquet": {"path": "t"}},
            "dataset_metadata_path",
            "and parquet are two tables",
        ),
        ({"caption_column": "text"}, "caption_column", "is of dataset_metadata_path"),
        ({"data_file_keys": ["text"]}, "data_file_keys", "is of dataset_metadata_path"),
        ({"type": "csv", "caption_strategy": "filename"}, "type", "csv needs csv_file"),
        ({"type": "csv", "csv_file": "t.csv"}, "csv_file", "needs csv_caption_column"),
        (
            {
                "type": "csv",
                "csv_file": "t.csv",
                "csv_caption_column": "text",
                "metadata_backend": "discovery",
            },
            "metadata_backend",
            "no folder to look into",
        ),
        ({"csv_file": "t.csv"}, "csv_file", "is read under type csv only"),
        ({"default_caption": "x"}, "default_caption", "textfile, parquet, csv, json, jsonl only"),
        ({"start_step": 9, "end_step": 8}, "end_step", "8 is before start_step (9)"),
        ({"start_epoch": 3, "end_epoch": 1}, "end_epoch", "1 is before start_epoch (3)"),
        (
            {"minimum_aspect_ratio": 2, "maximum_aspect_ratio": 1},
            "minimum_aspect_ratio",
            "is above maximum_aspect_ratio",
        ),
    ],
)
def test_contradictions_in_a_dataset_are_named(keys: dict[str, Any], key: str, says: str) -> None:
    [(found, sentence)] = contradictions(resolved(**keys))
    assert found == key
    assert says in sentence


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
def test_a_table_gives_the_pictures_and_their_captions_unless_told_otherwise(ending: str) -> None:
    path = f"t.{ending}"
    settings = resolved(DataSettings(caption_strategy="textfile"), dataset_metadata_path=path)
    assert (settings.metadata_backend, settings.caption_strategy) == ("parquet", ending)
    own = {"metadata_backend": "discovery", "caption_strategy": "textfile"}
    settings = resolved(dataset_metadata_path=path, **own)
    assert (settings.metadata_backend, settings.caption_strategy) == ("discovery", "textfile")


def test_repeats_are_counted_in_one_way_only() -> None:
    assert resolved(dataset_repeat=50).repeats == 49
    with pytest.raises(ValidationError, match="repeats and dataset_repeat say the same"):
        picture_set(repeats=3, dataset_repeat=4)
    with pytest.raises(ValidationError, match="repeats and dataset_repeat say the same"):
        picture_set(repeats=0, dataset_repeat=2)


def test_a_dataset_of_pictures_needs_a_folder() -> None:
    with pytest.raises(ValidationError, match="instance_data_dir is missing"):
        DatasetSettings(id="a")


@pytest.mark.parametrize("name", ["train", "training_state", "a/b", "..", "a\\b", "train.v1 ä"])
def test_any_dataset_id_gives_a_folder_of_its_own_inside_the_cache(name: str) -> None:
    folder = resolved(id=name).cache_dir_vae
    assert folder is not None
    assert folder.parent == Path("vae")
    assert folder.name not in ("", ".", "..")
    assert folder != resolved(id="a_b").cache_dir_vae


@pytest.mark.parametrize("name", ["", "a\nb"])
def test_a_dataset_needs_an_id_on_one_line(name: str) -> None:
    with pytest.raises(ValidationError):
        picture_set(id=name)
