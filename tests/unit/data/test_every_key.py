"""Every key of the datasets file changes something: here, or in the test that is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from PIL import Image

from simpletuner.core.errors import DataError
from simpletuner.core.section import hint_of
from simpletuner.core.seeds import key64
from simpletuner.data.plan import BatchPlan
from simpletuner.data.settings import DatasetSettings, ImageEmbedsSettings, TextEmbedsSettings
from tests.unit.data.making import SEEDS, opened, picture

CENTRED = MappingProxyType(
    {"resolution": 32, "crop": True, "crop_style": "center", "crop_aspect": "square"}
)

HERE: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "id": {"id": "dogs"},
        "resolution": {"resolution": 80},
        "resolution_type": {"resolution_type": "pixel", "resolution": 64.0},
        "minimum_image_size": {"minimum_image_size": 90},
        "maximum_image_size": {
            **CENTRED,
            "maximum_image_size": 60,
            "target_downsample_size": 50,
        },
        "target_downsample_size": {
            **CENTRED,
            "maximum_image_size": 60,
            "target_downsample_size": 50,
        },
        "max_upscale_threshold": {"max_upscale_threshold": 0.1, "resolution": 120},
        "aspect_bucket_alignment": {"aspect_bucket_alignment": 16},
        "aspect_bucket_rounding": {"aspect_bucket_rounding": 1},
        "rare_buckets": {"rare_buckets": "drop", "train_batch_size": 2},
        "image_background": {"image_background": "#ff0000"},
        "minimum_aspect_ratio": {"minimum_aspect_ratio": 1.0},
        "maximum_aspect_ratio": {"maximum_aspect_ratio": 1.0},
        "crop": {"crop": True},
        "crop_aspect": {"crop": True, "crop_aspect": "preserve"},
        "crop_aspect_buckets": {
            "crop": True,
            "crop_aspect": "closest",
            "crop_aspect_buckets": [2.0],
        },
        "timestep_sampling_offset": {"timestep_sampling_offset": -0.5},
        "crop_style": {"crop": True, "crop_style": "corner"},
        "caption_strategy": {"caption_strategy": "textfile"},
        "instance_prompt": {"caption_strategy": "instanceprompt", "instance_prompt": "sks"},
        "prepend_instance_prompt": {"instance_prompt": "sks", "prepend_instance_prompt": True},
        "only_instance_prompt": {"instance_prompt": "sks", "only_instance_prompt": True},
        "trigger_word": {"trigger_word": "zwx", "prepend_trigger_word": True},
        "prepend_trigger_word": {"trigger_word": "zwx", "prepend_trigger_word": True},
        "caption_dropout_probability": {"caption_dropout_probability": 0.5},
        "disable_multiline_split": {
            "caption_strategy": "textfile",
            "disable_multiline_split": True,
            "allow_excluded": True,
        },
        "caption_shuffle": {
            "caption_strategy": "textfile",
            "caption_shuffle": {"enable": True, "count": 2, "seed": 1},
            "allow_excluded": True,
        },
        "caption_filter_list": {"caption_filter_list": ("wide",)},
        "caption_prefix": {"caption_prefix": "a photo of"},
        "caption_suffix": {"caption_suffix": "at night"},
        "default_caption": {"caption_strategy": "textfile", "default_caption": "thing"},
        "repeats": {"repeats": 2},
        "probability": {"probability": 0.5},
        "max_num_samples": {"max_num_samples": 2},
        "train_batch_size": {**CENTRED, "train_batch_size": 3},
        "start_epoch": {"start_epoch": 2},
        "end_epoch": {"end_epoch": 2},
        "start_step": {"start_step": 5},
        "end_step": {"end_step": 5},
        "masked_loss_probability": {"alpha_as_mask": True, "masked_loss_probability": 0.4},
        "alpha_as_mask": {"alpha_as_mask": True},
        "is_regularisation_data": {"is_regularisation_data": True},
        "allow_excluded": {"caption_strategy": "textfile", "allow_excluded": True},
        "vae_cache_disable": {"vae_cache_disable": True, "crop": True},
    }
)
"""A change by key; its other keys are the same in what it is compared with."""

ELSEWHERE = MappingProxyType(
    {
        "type": "test_a_download_that_is_killed_is_fetched_again_and_whole",
        "disabled": "test_disabled_entries_are_left_out",
        "skip_file_discovery": "test_no_stage_of_a_start_is_skipped",
        "max_workers": "test_the_number_of_threads_changes_nothing",
        "metadata_backend": "test_rows_decide_only_under_metadata_backend_parquet",
        "dataset_metadata_path": "test_a_folder_with_a_metadata_table_is_trained_on_as_printed",
        "data_file_keys": "test_a_folder_with_a_metadata_table_is_trained_on_as_printed",
        "dataset_repeat": "test_a_folder_with_a_metadata_table_is_trained_on_as_printed",
        "caption_column": "test_several_columns_are_several_captions_and_a_fallback_stands_in",
        "parquet": "test_several_columns_are_several_captions_and_a_fallback_stands_in",
        "csv_file": "test_a_download_that_is_killed_is_fetched_again_and_whole",
        "csv_url_column": "test_every_format_says_the_same",
        "csv_caption_column": "test_a_download_that_is_killed_is_fetched_again_and_whole",
        "csv_cache_dir": "test_an_address_is_asked_for_once_in_all_runs",
        "conditioning_type": "test_it_is_cut_as_its_picture_is",
        "conditioning_data": "test_masks_belong_to_the_pictures_that_name_them_or_that_they_name",
        "source_dataset_id": "test_masks_belong_to_the_pictures_that_name_them_or_that_they_name",
        "dataset_type": "test_an_eval_set_is_encoded_told_and_changes_nothing_that_is_trained",
        "instance_data_dir": "test_exactly_what_a_change_touches_is_encoded_again",
        "cache_dir_vae": "test_caches_lie_in_the_output_folder_unless_said_otherwise",
        "cache_dir": "test_captions_and_latents_lie_where_entries_say",
        "vae_cache_ondemand": (
            "test_pictures_encoded_on_demand_are_those_of_the_cache_and_encoded_once"
        ),
        "vae_batch_size": "test_a_latent_depends_neither_on_its_batch_nor_on_the_order",
        "write_batch_size": "test_write_batch_size_entries_are_gathered_before_one_write",
        "text_embeds": "test_captions_and_latents_lie_where_entries_say",
        "image_embeds": "test_captions_and_latents_lie_where_entries_say",
        "scan_for_errors": "test_scan_for_errors_reads_all_latents_when_a_run_starts",
        "default": "test_captions_are_kept_where_a_dataset_says",
        "text_encoder_batch_size": (
            "test_a_memory_that_is_full_while_encoding_says_what_takes_less_and_keeps_the_rest"
        ),
        "text_cache_ondemand": "test_a_run_is_the_same_whenever_captions_are_encoded",
        "text_cache_disable": "test_an_entry_of_the_datasets_file_says_it_too",
    }
)
"""A test by key, where the key's effect is not in a dataset as it is opened."""


def accepted() -> set[str]:
    return {
        name
        for section in (DatasetSettings, TextEmbedsSettings, ImageEmbedsSettings)
        for name, field in section.model_fields.items()
        if hint_of(field).pending is not True
    }


def test_every_key_is_in_one_of_the_two_tables() -> None:
    assert accepted() == {*HERE, *ELSEWHERE}


def test_the_tests_that_are_named_are_there() -> None:
    root = Path(__file__).parents[2]
    written = "\n".join(path.read_text(encoding="utf-8") for path in root.rglob("test_*.py"))
    names = set(re.findall(r"def (test_\w+)\(", written))
    assert set(ELSEWHERE.values()) <= names


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of several shapes, one with alpha; three without a text."""
    folder = tmp_path_factory.mktemp("keys") / "data"
    shapes = ((96, 64), (64, 96), (80, 80), (128, 64), (200, 70), (96, 66), (97, 64), (64, 64))
    for number, size in enumerate(shapes):
        text = None if number > 4 else f"red, blue, green {number}\nsecond line {number}"
        path = picture(folder, f"wide_{number}.png", size, text)
        if number == 2:
            Image.new("RGBA", size, (0, 0, 0, 100)).save(path)
    return folder


def seen(pictures: Path, index: Path, **settings: Any) -> str:
    """What a run would train on of a dataset beside another, or why it is refused.

    Nothing in it repeats a setting: each value is made of the pictures, or of what is drawn when.
    """
    try:
        source = opened(pictures, index, **settings)
    except DataError as error:
        return f"refused: {error.message}"
    rows = range(len(source))
    draws = [source.sample(row, epoch, 0, SEEDS) for row in rows for epoch in range(12)]
    beside = opened(pictures, index, id="beside")
    shape = {"train_batch_size": 2, "gradient_accumulation_steps": 1}
    plan = BatchPlan.of([source, beside], **shape, seeds=SEEDS)
    return json.dumps(
        {
            "excluded": [repr(each) for each in source.excluded()],
            "paths": [source.path(row) for row in rows],
            "captions": [source.captions(row) for row in rows],
            "boxes": source.boxes().tolist(),
            "draws": [repr(draw) for draw in draws],
            "plan": [repr(plan.window(step)) for step in range(60)],
            "pixels": [key64(source.pixels(row).tobytes()) for row in rows],
        },
        default=str,
    )


@pytest.mark.parametrize("key", list(HERE))
def test_a_key_changes_what_can_be_seen(key: str, pictures: Path, tmp_path: Path) -> None:
    change = dict(HERE[key])
    without = {name: value for name, value in change.items() if name != key}
    if key in ("target_downsample_size", "instance_prompt", "crop_aspect_buckets"):
        others = {
            "target_downsample_size": {"target_downsample_size": 55},
            "instance_prompt": {"instance_prompt": "zwx"},
            "crop_aspect_buckets": {"crop_aspect_buckets": [0.5]},
        }
        without |= others[key]
    elif key == "maximum_image_size":
        without = {**CENTRED, "maximum_image_size": 150, "target_downsample_size": 50}
    elif key == "resolution_type":
        without = {"resolution": 64.0}
    assert seen(pictures, tmp_path, **change) != seen(pictures, tmp_path, **without)
