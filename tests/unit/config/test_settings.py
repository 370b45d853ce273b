"""The declarations of all settings: complete, consistent, and lenient where users are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from simpletuner.config.renames import DATASET_RENAMES, RENAMES
from simpletuner.config.root import Config
from simpletuner.config.schedule import ScheduleSettings
from simpletuner.config.unsupported import UNSUPPORTED, asks_nothing
from simpletuner.core.section import Section, hint_of, is_pending
from simpletuner.data.settings import (
    DatasetSettings,
    DataSettings,
    TextEmbedsSettings,
    contradictions,
    inherit,
    inherit_text_embeds,
)
from simpletuner.models.settings import ModelSettings
from simpletuner.optim.settings import OptimizerSettings
from simpletuner.runtime.settings import RuntimeSettings
from simpletuner.tracking.settings import TrackingSettings
from simpletuner.validation.settings import ValidationSettings
from tests.unit.config.workplace import Workplace

SECTIONS: dict[str, type[Section]] = {
    name: field.annotation  # type: ignore[misc]
    for name, field in Config.model_fields.items()
}
GLOBAL = [key for section in SECTIONS.values() for key in section.model_fields]
REPOSITORY = Path(__file__).parents[3]
OPTIONS = Path(__file__).with_name("simpletuner_options.txt").read_text().split()
"""Every option of SimpleTuner 4.8.0 that touches the training of images."""

SDXL = {
    "model_type": "lora",
    "model_family": "sdxl",
    "model_flavour": "base-1.0",
    "output_dir": "/home/user/output/models",
    "validation_resolution": "1024x1024,1280x768",
    "validation_guidance": 3.4,
    "use_gradient_checkpointing": True,
    "learning_rate": 1e-4,
}
QUANTISED = {
    "base_model_precision": "int8-quanto",
    "text_encoder_1_precision": "no_change",
    "text_encoder_2_precision": "no_change",
    "text_encoder_3_precision": "no_change",
    "optimizer": "optimi-lion",
}
PREVIEW = {"validation_preview": True, "validation_preview_steps": 1}
SD3 = {
    "model_type": "lora",
    "model_family": "sd3",
    "pretrained_model_name_or_path": "stabilityai/stable-diffusion-3.5-large",
    "output_dir": "/home/user/outputs/models",
    "validation_resolution": "1024x1024,1280x768",
    "validation_guidance": 3.0,
    "validation_prompt": "your main test prompt here",
    "user_prompt_library": "config/user_prompt_library.json",
}
SKIP_LAYERS = {
    "validation_guidance_skip_layers": [7, 8, 9],
    "validation_guidance_skip_layers_start": 0.01,
    "validation_guidance_skip_layers_stop": 0.2,
    "validation_guidance_skip_scale": 2.8,
    "validation_guidance": 4.0,
    "flow_use_uniform_schedule": True,
    "flow_schedule_auto_shift": True,
}
PROSE = {
    "use_dora": True,
    "attention_mechanism": "sageattention",
    "mixed_precision": "no",
    "vae_cache_disable": True,
    "vae_cache_ondemand": True,
    "push_to_hub": True,
    "report_to": "wandb",
    "max_grad_norm": 0.1,
    "t5_padding": "zero",
    "sd3_clip_uncond_behaviour": "zero",
    "sd3_t5_uncond_behaviour": "empty_string",
    "flow_schedule_shift": 1,
    "optimizer": "bnb-lion8bit-paged",
    "base_model_precision": "nf4-bnb",
    "train_batch_size": 4,
    "gradient_accumulation_steps": 3,
    "vae_batch_size": 1,
    "validation_num_inference_steps": 20,
    "base_model_default_dtype": "bf16",
    "text_encoder_3_precision": "int4-quanto",
    "quantize_via": "cpu",
    "evaluation_type": "clip",
    "scheduled_sampling_max_step_offset": 2,
    "diff2flow_enabled": True,
}
"""What the documents name in running text."""

SDXL_PICTURES = {
    "id": "pseudo-camera-10k-sdxl",
    "type": "local",
    "crop": True,
    "crop_aspect": "square",
    "crop_style": "random",
    "resolution": 1.0,
    "minimum_image_size": 0.25,
    "maximum_image_size": 1.0,
    "target_downsample_size": 1.0,
    "resolution_type": "area",
    "cache_dir_vae": "cache/vae/sdxl/pseudo-camera-10k",
    "instance_data_dir": "/home/user/simpletuner/datasets/pseudo-camera-10k",
    "disabled": False,
    "skip_file_discovery": "",
    "caption_strategy": "filename",
    "metadata_backend": "discovery",
}
SD3_PICTURES = {
    **SDXL_PICTURES,
    "id": "pseudo-camera-10k-sd3",
    "crop_style": "center",
    "resolution": 1024,
    "minimum_image_size": 0,
    "maximum_image_size": 1024,
    "target_downsample_size": 1024,
    "resolution_type": "pixel_area",
}
TEXT_EMBEDS = {
    "id": "text-embeds",
    "type": "local",
    "dataset_type": "text_embeds",
    "default": True,
    "cache_dir": "cache/text/sdxl/pseudo-camera-10k",
    "disabled": False,
    "write_batch_size": 128,
}


def sectioned(flat: dict[str, Any]) -> Config:
    """The Config of flat keys under any of their names."""
    named = {RENAMES.get(key, key): value for key, value in flat.items()}
    known = {"model_family": "sdxl", **named}
    parts = {
        name: section(**{k: v for k, v in known.items() if k in section.model_fields})
        for name, section in SECTIONS.items()
    }
    assert set(named) <= set(GLOBAL)
    return Config(**parts)  # type: ignore[arg-type]


def pending_keys(config: Config) -> set[str]:
    return {
        key
        for name, section in SECTIONS.items()
        for key, value in dict(dict(config)[name]).items()
        if is_pending(section.model_fields[key], value)
    }


def picture_set(**keys: Any) -> DatasetSettings:
    return DatasetSettings(**{"id": "a", "instance_data_dir": "pictures", **keys})


def resolved(data: DataSettings | None = None, **keys: Any) -> DatasetSettings:
    return inherit(picture_set(**keys), data or DataSettings(), vae_root=Path("vae"))


def test_no_key_stands_in_two_sections() -> None:
    assert len(GLOBAL) == len(set(GLOBAL))


def test_every_option_of_simpletuner_is_a_setting_or_a_rename_or_explained() -> None:
    assert len(OPTIONS) == len(set(OPTIONS)) == 477
    homes = {
        name: [name in GLOBAL, name in RENAMES, name in UNSUPPORTED].count(True) for name in OPTIONS
    }
    assert [name for name, count in homes.items() if count != 1] == []


def test_renames_and_explanations_do_not_hide_settings() -> None:
    assert not set(RENAMES) & set(GLOBAL)
    assert not set(RENAMES) & set(UNSUPPORTED)
    assert not set(UNSUPPORTED) & set(GLOBAL)
    assert set(RENAMES.values()) <= set(GLOBAL)
    assert set(DATASET_RENAMES.values()) <= set(DatasetSettings.model_fields)
    assert not set(DATASET_RENAMES) & set(DatasetSettings.model_fields)


def test_explanations_name_only_settings_that_exist() -> None:
    known = {*GLOBAL, *DatasetSettings.model_fields, "flow_", "max_pixels"}
    for sentence in set(UNSUPPORTED.values()):
        named = set(re.findall(r"\b[a-z0-9]+_[a-z0-9_]*", sentence))
        assert named <= known, sentence
        assert not sentence.endswith("."), sentence


def test_help_texts_are_sentences() -> None:
    for section in (*SECTIONS.values(), DatasetSettings, TextEmbedsSettings):
        for key, field in section.model_fields.items():
            assert field.description, key
            assert field.description.endswith("."), key


def test_help_texts_name_only_settings_that_exist() -> None:
    values = {
        "pixel_area",
        "max_pixels",
        "model_index",
        "text_embeds",
        "image_embeds",
        "before_after",
    }
    known = {*GLOBAL, *DatasetSettings.model_fields, *values}
    for section in (*SECTIONS.values(), DatasetSettings, TextEmbedsSettings):
        for key, field in section.model_fields.items():
            named = re.findall(r"\b[a-z0-9]+(?:_[a-z0-9]+)+", field.description or "")
            assert set(named) <= known, (key, named)


@pytest.mark.parametrize("section", [*SECTIONS.values(), TextEmbedsSettings, DatasetSettings])
def test_every_default_is_a_value_the_user_might_write(section: type[Section]) -> None:
    needed = {"model_family": "sdxl", "id": "a", "instance_data_dir": "pictures"}
    built = section(**{k: v for k, v in needed.items() if k in section.model_fields})
    written = json.loads(built.model_dump_json(exclude_none=True))
    assert section(**written) == built


def test_nothing_is_pending_by_default() -> None:
    assert pending_keys(Config(model=ModelSettings(model_family="sdxl"))) == set()
    fields = DatasetSettings.model_fields
    assert not [k for k, v in dict(resolved()).items() if is_pending(fields[k], v)]


def test_pending_values_are_among_those_a_setting_takes() -> None:
    for section in (*SECTIONS.values(), DatasetSettings, TextEmbedsSettings):
        for key, field in section.model_fields.items():
            pending = hint_of(field).pending
            for value in pending if isinstance(pending, tuple) else ():
                other = {"model_family": "sdxl", "id": "a", "instance_data_dir": "x"}
                known = {k: v for k, v in other.items() if k in section.model_fields}
                built = section(**{**known, key: value})
                assert is_pending(field, dict(built)[key]), (key, value)


@pytest.mark.parametrize(
    ("printed", "waiting"),
    [
        (SDXL, set()),
        (QUANTISED, set()),
        (PREVIEW, {"validation_preview"}),
        (SKIP_LAYERS, {"validation_guidance_skip_layers"}),
    ],
)
def test_printed_settings_are_taken_and_what_waits_is_named(
    printed: dict[str, Any], waiting: set[str]
) -> None:
    assert waiting <= pending_keys(sectioned(printed))
    assert pending_keys(sectioned({**printed, **SDXL})) == waiting


@pytest.mark.parametrize("printed", [SD3, PROSE])
def test_other_printed_settings_are_taken(printed: dict[str, Any]) -> None:
    sectioned(printed)


@pytest.mark.parametrize("entry", [SDXL_PICTURES, SD3_PICTURES])
def test_printed_picture_sets_are_taken_whole(entry: dict[str, Any]) -> None:
    settings = inherit(DatasetSettings(**entry), DataSettings(), vae_root=Path("vae"))
    assert list(contradictions(settings)) == []
    fields = DatasetSettings.model_fields
    assert not [k for k, v in dict(settings).items() if is_pending(fields[k], v)]
    assert settings.cache_dir_vae == Path("cache/vae/sdxl/pseudo-camera-10k")


def test_printed_text_embeds_entry_is_taken_whole() -> None:
    settings = inherit_text_embeds(TextEmbedsSettings(**TEXT_EMBEDS), text_root=Path("text"))
    assert settings.cache_dir == Path("cache/text/sdxl/pseudo-camera-10k")
    assert settings.write_batch_size == 128


@pytest.mark.parametrize(
    ("written", "sizes"),
    [
        ("1024x1024,1280x768", ((1024, 1024), (1280, 768))),
        ("1024", ((1024, 1024),)),
        (1024, ((1024, 1024),)),
        (["512x768", 640], ((512, 768), (640, 640))),
        ([[1024, 768]], ((1024, 768),)),
        ("[512, 640]", ((512, 512), (640, 640))),
        ("1.0", ((1024, 1024),)),
        (0.25, ((512, 512),)),
    ],
)
def test_validation_sizes_are_read_as_users_write_them(
    written: object, sizes: tuple[tuple[int, int], ...]
) -> None:
    assert ValidationSettings(validation_resolution=written).validation_resolution == sizes  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("1020x768", "multiples of 8, as in 1024x768"),
        ("large", "'large' is no size"),
        ("", "at least 1 item"),
        (0, "multiples of 8"),
    ],
)
def test_a_size_that_cannot_be_rendered_is_refused(written: object, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ValidationSettings(validation_resolution=written)  # type: ignore[arg-type]


@pytest.mark.parametrize("written", [[7, 8, 9], "7,8,9", "[7, 8, 9]"])
def test_skipped_layers_are_a_list(written: object) -> None:
    settings = ValidationSettings(validation_guidance_skip_layers=written)  # type: ignore[arg-type]
    assert settings.validation_guidance_skip_layers == (7, 8, 9)


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("none", ()),
        ("", ()),
        ([], ()),
        ("wandb", ("wandb",)),
        ("tensorboard, wandb", ("tensorboard", "wandb")),
        (["wandb", "none"], ("wandb",)),
    ],
)
def test_trackers_are_a_list_or_names_with_commas(written: object, names: tuple[str, ...]) -> None:
    settings = TrackingSettings(report_to=written)  # type: ignore[arg-type]
    assert settings.report_to == names
    assert is_pending(TrackingSettings.model_fields["report_to"], settings.report_to) == bool(names)


def test_a_tracker_nobody_knows_is_refused() -> None:
    with pytest.raises(ValidationError, match="report_to"):
        TrackingSettings(report_to="wandbb")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "written", ["amsgrad=true,eps=1e-6,name=x", '{"amsgrad": true, "eps": 1e-6, "name": "x"}']
)
def test_optimizer_options_are_read_from_pairs_or_an_object(written: str) -> None:
    settings = OptimizerSettings(optimizer_config=written)  # type: ignore[arg-type]
    assert settings.optimizer_config == {"amsgrad": True, "eps": 1e-6, "name": "x"}


def test_optimizer_options_without_a_value_are_refused() -> None:
    with pytest.raises(ValidationError, match="'amsgrad' is not name=value"):
        OptimizerSettings(optimizer_config="amsgrad")  # type: ignore[arg-type]


def test_a_name_outside_its_table_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ValidationError, match="did you mean adamw_bf16"):
        OptimizerSettings(optimizer="adamw_bf61")
    with pytest.raises(ValidationError, match="unknown model_family 'sdlx'; did you mean sdxl"):
        ModelSettings(model_family="sdlx")


def test_numbers_may_be_written_as_text() -> None:
    settings = OptimizerSettings(learning_rate="1e-5", max_grad_norm="0")  # type: ignore[arg-type]
    assert settings.learning_rate == 1e-5
    assert settings.max_grad_norm == 0


def test_betas_come_in_pairs() -> None:
    assert OptimizerSettings(optimizer_beta1=0.8, optimizer_beta2=0.9).optimizer_beta2 == 0.9
    with pytest.raises(ValidationError, match="optimizer_beta1 and optimizer_beta2"):
        OptimizerSettings(optimizer_beta1=0.8)


@pytest.mark.parametrize("steps", [100, "100"])
def test_steps_alone_turn_epochs_off(steps: object) -> None:
    schedule = ScheduleSettings(max_train_steps=steps)  # type: ignore[arg-type]
    assert (schedule.max_train_steps, schedule.num_train_epochs) == (100, 0)


@pytest.mark.parametrize("steps", [0, None])
def test_without_steps_a_run_is_one_epoch(steps: int | None) -> None:
    assert ScheduleSettings(max_train_steps=steps).num_train_epochs == 1


def test_steps_and_epochs_together_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"max_train_steps \(5\) and num_train_epochs \(2\)"):
        ScheduleSettings(max_train_steps=5, num_train_epochs=2)
    with pytest.raises(ValidationError, match="both 0"):
        ScheduleSettings(num_train_epochs=0)


def test_an_empty_checkpoint_name_is_a_fresh_start() -> None:
    assert ScheduleSettings().resume_from_checkpoint == "latest"
    assert ScheduleSettings(resume_from_checkpoint="").resume_from_checkpoint == "none"


def test_several_processes_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValidationError, match="multiply gradient_accumulation_steps by 3"):
        RuntimeSettings(num_processes=3)


@pytest.mark.parametrize(
    ("name", "value", "nothing"),
    [
        ("crepa_enabled", False, True),
        ("crepa_enabled", True, False),
        ("crepa_lambda", 0.5, True),
        ("fsdp_version", "2", True),
        ("adam_beta2", 0.999, True),
        ("adam_beta2", 0.9, False),
        ("tread_config", {"routes": []}, False),
        ("seed_for_each_device", True, True),
        ("deepspeed_config", None, True),
    ],
)
def test_an_unsupported_setting_at_its_default_asks_nothing(
    name: str, value: object, nothing: bool
) -> None:
    assert name in UNSUPPORTED
    assert asks_nothing(name, value) is nothing


def test_shipped_files_hold_valid_settings_and_send_nothing_anywhere() -> None:
    folder = REPOSITORY / "config"
    shipped = json.loads((folder / "config.json.example").read_text())
    assert shipped.pop("$schema")
    config = sectioned(shipped)
    assert pending_keys(config) == set()
    assert not config.publish.push_to_hub
    assert config.tracking.report_to == ()
    unset = {"model_flavour", "pretrained_model_name_or_path", "data_backend_config"}
    assert not unset & set(shipped), "each would stand against what the quickstarts print"
    assert not {"gradient_checkpointing", "num_train_epochs"} & set(shipped), "the same"
    pictures, text_embeds = json.loads((folder / "multidatabackend.json.example").read_text())
    assert list(contradictions(resolved(**pictures))) == []
    assert TextEmbedsSettings(**text_embeds).default
    prompts = json.loads((folder / "user_prompt_library.json.example").read_text())
    assert all(isinstance(text, str) and text for text in prompts.values())
    webhooks = json.loads((folder / "webhooks.json.example").read_text())
    assert TrackingSettings(webhook_config=webhooks).webhook_config == tuple(webhooks)


def test_one_shipped_file_serves_both_quickstarts() -> None:
    shipped = json.loads((REPOSITORY / "config" / "config.json.example").read_text())
    shipped.pop("$schema")
    assert sectioned({**shipped, **SDXL}).model.model_flavour == "base-1.0"
    assert sectioned({**shipped, **SD3}).validation.validation_guidance == 3.0


def test_declaring_settings_loads_no_torch() -> None:
    code = (
        "import sys, simpletuner.config.root, simpletuner.config.unsupported;"
        "sys.exit(bool({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


@pytest.mark.parametrize(
    "key",
    ["train_batch_size", "gradient_accumulation_steps", "max_train_steps", "num_train_epochs"],
)
def test_a_schedule_that_nothing_can_count_to_is_refused(place: Workplace, key: str) -> None:
    place.config(**{key: 10**20})
    [message] = place.messages()
    assert message.startswith(f"{key}: must be at most 1000000")
