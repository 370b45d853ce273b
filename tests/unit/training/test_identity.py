"""What a resume refuses, and what it goes on with and tells: every setting that shapes a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from simpletuner.config.load import load
from simpletuner.core.errors import DataError, TrainingError
from simpletuner.core.events import Bus
from simpletuner.core.seeds import Seeds
from simpletuner.data.plan import BatchPlan
from simpletuner.data.source import DataSource
from simpletuner.models.loading import open_family
from simpletuner.training.identity import (
    check_data,
    check_model,
    machine_told,
    settings_told,
    starting_state,
)
from simpletuner.training.state import TrainState, versions
from simpletuner.training.timetable import Timetable
from tests.runs import Run, make_pictures
from tests.unit.training.builds import CPU

BUILT = ("adamw_bf16", "torch-adamw", "optimi-lion", "bnb-adamw8bit", "muon")
DATASET = MappingProxyType({"crop": True, "resolution": 32})
Changes = Mapping[str, Any]


Knows = Callable[..., TrainState]


@pytest.fixture(scope="module")
def knows(
    tiny_sdxl: Path, tiny_sd3: Path, tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory
) -> Knows:
    """From settings to what is kept of them, as a run does it, without training."""
    root = tmp_path_factory.mktemp("identity")
    pictures = make_pictures(root / "pictures")
    models, kept = {"sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}, {}

    def known(
        family_name: str, *, dataset: Changes = MappingProxyType({}), **settings: Any
    ) -> TrainState:
        key = repr((family_name, dict(dataset), settings))
        if key in kept:
            return kept[key]
        run = Run(root / "run", models[family_name], pictures)
        run.dataset |= {**DATASET, **dataset}
        run.settings |= {"model_family": family_name, "optimizer": "adamw_bf16"}
        loaded = load(["--config", str(run.write(**settings))], {}, root)
        config, datasets = loaded.config, loaded.datasets
        sources = [
            DataSource.open(entry, index_folder=root / "index", bus=Bus())
            for entry in datasets.training
        ]
        family = open_family(config.model, digests=root / "digests.json")
        shape, seeds = config.schedule.window_shape, Seeds(config.runtime.seed)
        plan = BatchPlan.of(sources, **shape, seeds=seeds)
        total = Timetable.of(config.schedule, config.validation, plan.steps).total_steps
        kept[key] = starting_state(config, family, plan, sources, total, CPU)
        return kept[key]

    return known


# --- refused unless told to go on --------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({}, {"seed": 7}, "seed changed (was 42, now 7)"),
        ({}, {"train_batch_size": 1}, "train_batch_size changed (was 2, now 1)"),
        (
            {},
            {"gradient_accumulation_steps": 3},
            "gradient_accumulation_steps changed (was 1, now 3)",
        ),
        ({}, {"vae_dtype": "bf16"}, "vae_dtype changed (was default: fp32, now bf16)"),
        (
            {"vae_dtype": "bf16"},
            {"mixed_precision": "bf16", "vae_dtype": "fp32"},
            "vae_dtype changed (was bf16, now fp32)",
        ),
        (
            {},
            {"text_encoder_2_precision": "int8-quanto"},
            "text_encoder_2_precision changed (was no_change, now int8-quanto)",
        ),
        ({}, {"vae_enable_tiling": True}, "vae_enable_tiling changed (was false, now true)"),
        ({}, {"data_aesthetic_score": 6.5}, "data_aesthetic_score changed (was 7, now 6.5)"),
    ],
)
def test_another_setting_of_the_data_is_refused_by_name_and_not_called_other_data(
    knows: Knows, before: Changes, after: Changes, told: str
) -> None:
    was, now = knows("sdxl", **before).data, knows("sdxl", **after).data
    with pytest.raises(DataError) as error:
        check_data(was, now, "refuse")
    assert error.value.message == f"the checkpoint was trained with other settings: {told}"
    assert error.value.fix.endswith("--on_data_change continue")
    assert check_data(was, now, "continue") == (
        f"{told} since the checkpoint; going on with what is there now"
    )


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({}, {"crop_style": "corner"}, "crop_style changed (was random, now corner)"),
        (
            {"crop": False},
            {},
            "resizes changed (by resolution, crop, maximum_image_size or target_downsample_size)",
        ),
        (
            {},
            {"maximum_image_size": 70, "target_downsample_size": 60},
            "resizes changed (by resolution, crop, maximum_image_size or target_downsample_size)",
        ),
        (
            {"maximum_image_size": 70, "target_downsample_size": 60},
            {"maximum_image_size": 70, "target_downsample_size": 50},
            "resizes changed (by resolution, crop, maximum_image_size or target_downsample_size)",
        ),
        ({}, {"resolution": 48}, "sizes changed (by resolution, crop, crop_aspect, rare"),
        (
            {},
            {"image_background": "#00FF00"},
            "image_background changed (was #ffffff, now #00ff00)",
        ),
        ({}, {"vae_cache_disable": True}, "vae_cache_disable changed (was false, now true)"),
        ({}, {"repeats": 2}, "repeats changed (was 0, now 2)"),
        ({}, {"probability": 0.5}, "probability changed (was 1.0, now 0.5)"),
        ({}, {"caption_dropout_probability": 0.5}, "captions changed"),
        ({}, {"id": "other"}, "dataset other is new, dataset pictures is gone"),
    ],
)
def test_another_dataset_is_refused_by_name(
    knows: Knows, before: Changes, after: Changes, told: str
) -> None:
    was, now = knows("sdxl", dataset=before).data, knows("sdxl", dataset=after).data
    with pytest.raises(DataError) as error:
        check_data(was, now, "refuse")
    assert error.value.message.startswith("the checkpoint was trained on other data: dataset ")
    assert told in error.value.message
    assert told in check_data(was, now, "continue")


def test_what_follows_from_other_pictures_is_not_blamed_on_settings(knows: Knows) -> None:
    was, now = knows("sdxl").data, knows("sdxl", dataset={"max_num_samples": 2}).data
    with pytest.raises(DataError) as error:
        check_data(was, now, "refuse")
    assert error.value.message == (
        "the checkpoint was trained on other data: dataset pictures: pictures changed"
    )


def test_data_and_settings_that_changed_at_once_are_told_apart(knows: Knows) -> None:
    was, now = knows("sdxl").data, knows("sdxl", dataset={"repeats": 1}, seed=7).data
    with pytest.raises(DataError) as error:
        check_data(was, now, "refuse")
    assert error.value.message == (
        "the checkpoint was trained on other data: dataset pictures: repeats changed (was 0, now"
        " 1); and with other settings: seed changed (was 42, now 7)"
    )


# --- always refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "after", "told"),
    [
        ("sdxl", {"lora_alpha": 9}, "lora_alpha changed (was 4, now 9)"),
        ("sdxl", {"lora_rank": 8, "lora_alpha": 4}, "lora_rank changed (was 4, now 8)"),
        (
            "sdxl",
            {"prediction_type": "v_prediction"},
            "prediction_type changed (was epsilon, now v_prediction)",
        ),
        (
            "sdxl",
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            "prediction_type changed (was epsilon, now v_prediction), rescale_betas_zero_snr"
            " changed (was false, now true)",
        ),
        ("sd3", {"t5_padding": "zero"}, "t5_padding changed (was unmodified, now zero)"),
        (
            "sd3",
            {"tokenizer_max_length": 77},
            "tokenizer_max_length changed (was 154, now 77)",
        ),
        (
            "sd3",
            {"sd3_clip_uncond_behaviour": "zero", "sd3_t5_uncond_behaviour": "empty_string"},
            "sd3_clip_uncond_behaviour changed (was empty_string, now zero)",
        ),
        (
            "sd3",
            {"sd3_t5_uncond_behaviour": "zero"},
            "sd3_t5_uncond_behaviour changed (was empty_string, now zero)",
        ),
    ],
)
def test_what_the_tensors_mean_is_refused_by_name_and_value(
    knows: Knows, family: str, after: Changes, told: str
) -> None:
    with pytest.raises(TrainingError) as error:
        check_model(knows(family).model, knows(family, **after).model)
    assert error.value.message == f"this run cannot go on from the checkpoint: {told}"
    assert error.value.fix == "undo the change, or start over: resume_from_checkpoint=none"


@pytest.mark.parametrize("name", ["base model", "text encoders", "VAE"])
def test_other_weights_are_refused_without_their_digests(knows: Knows, name: str) -> None:
    model = knows("sd3").model
    with pytest.raises(TrainingError) as error:
        check_model({**model, name: "0123456789abcdef"}, model)
    assert error.value.message == f"this run cannot go on from the checkpoint: {name} changed"


@pytest.mark.parametrize(("before", "now"), list(product(BUILT, BUILT)))
def test_another_optimizer_is_refused_by_name(knows: Knows, before: str, now: str) -> None:
    was, is_now = (knows("sdxl", optimizer=name).model for name in (before, now))
    if before == now:
        check_model(was, is_now)
        return
    with pytest.raises(TrainingError, match=rf"optimizer changed \(was {before}, now {now}\)"):
        check_model(was, is_now)


# --- gone on with and told ---------------------------------------------------------------------

FLAT = MappingProxyType({"lr_scheduler": "constant"})
BF16 = MappingProxyType({"mixed_precision": "bf16"})


@pytest.mark.parametrize(
    ("family", "before", "after", "told"),
    [
        ("sdxl", {}, {"learning_rate": 1e-4}, "learning_rate: was 0.001, now 0.0001"),
        ("sdxl", FLAT, {"lr_scheduler": "linear"}, "lr_scheduler: was constant, now linear"),
        ("sdxl", {}, {"lr_warmup_steps": 3}, "lr_warmup_steps: was 0, now 3"),
        ("sdxl", {}, {"lr_end": 1e-5}, "lr_end: was 4e-07, now 1e-05"),
        ("sdxl", {}, {"lr_num_cycles": 3}, "lr_num_cycles: was 1, now 3"),
        (
            "sdxl",
            {"lr_scheduler": "polynomial"},
            {"lr_scheduler": "polynomial", "lr_power": 1},
            "lr_power: was 0.8, now 1",
        ),
        (
            "sdxl",
            {},
            {"max_train_steps": 9},
            "total steps: was 4, now 9; cosine depends on the total steps: the learning rate jumps",
        ),
        (
            "sdxl",
            {},
            {"max_train_steps": 0, "num_train_epochs": 3},
            "cosine depends on the total steps: the learning rate jumps",
        ),
        ("sdxl", {}, {"adam_weight_decay": 0.2}, "adam_weight_decay: was 0.01, now 0.2"),
        ("sdxl", {}, {"adam_epsilon": 1e-5}, "adam_epsilon: was 1e-06, now 1e-05"),
        (
            "sdxl",
            {},
            {"optimizer_beta1": 0.8, "optimizer_beta2": 0.99},
            "optimizer_beta1: was 0.9, now 0.8; optimizer_beta2: was 0.999, now 0.99",
        ),
        (
            "sdxl",
            {"optimizer": "optimi-lion"},
            {"optimizer": "optimi-lion", "optimizer_config": {"decouple_lr": True}},
            "optimizer_config.decouple_lr: was false, now true",
        ),
        ("sdxl", {}, {"max_grad_norm": 0.5}, "max_grad_norm: was 1, now 0.5"),
        ("sdxl", {}, {"grad_clip_method": "value"}, "grad_clip_method: was norm, now value"),
        ("sdxl", {}, {"lora_dropout": 0.1}, "lora_dropout: was 0, now 0.1"),
        ("sdxl", {}, {"loraplus_lr_ratio": 8}, "loraplus_lr_ratio: was unused, now 8"),
        (
            "sdxl",
            {"trainable_models": ["conv_in"]},
            {"trainable_models": ["conv_in"], "trainable_models_lr": 1e-5},
            "trainable_models_lr: was 0.001, now 1e-05",
        ),
        ("sdxl", {}, BF16, "mixed_precision: was no, now bf16"),
        ("sdxl", {}, {"disable_tf32": True}, "disable_tf32: was false, now true"),
        ("sdxl", {}, {"gradient_precision": "fp32"}, "gradient_precision: was unused, now fp32"),
        (
            "sdxl",
            BF16,
            {**BF16, "base_model_default_dtype": "fp32"},
            "base_model_default_dtype: was bf16, now fp32",
        ),
        (
            "sdxl",
            {"snr_gamma": 5},
            {"use_soft_min_snr": True},
            "snr_gamma: was 5, now unused; soft_min_snr_sigma_data: was unused, now 0.5;"
            " use_soft_min_snr: was false, now true",
        ),
        ("sd3", {}, {"flow_schedule_shift": 1}, "flow_schedule_shift: was 3, now 1"),
        ("sd3", {}, {"flow_sigmoid_scale": 2}, "flow_sigmoid_scale: was 1, now 2"),
        (
            "sd3",
            {},
            {"flow_cubic_schedule_weights": [1, 2]},
            "flow_cubic_schedule_weights: was none, now (1.0, 2.0); flow_sigmoid_scale: was 1, now"
            " unused",
        ),
        (
            "sd3",
            {"flow_custom_timesteps": [900, 100]},
            {"flow_custom_timesteps": [900, 100], "flow_timesteps_mode": "round-robin"},
            "flow_timesteps_mode: was fixed-list, now round-robin",
        ),
        (
            "sdxl",
            {},
            {"refiner_training": True},
            "refiner_training: was false, now true; refiner_training_invert_schedule: was unused,"
            " now false; refiner_training_strength: was unused, now 0.2",
        ),
        (
            "sdxl",
            {},
            {"diff2flow_enabled": True, "diff2flow_loss": True},
            "diff2flow_enabled: was unused, now true; diff2flow_loss: was unused, now true",
        ),
        (
            "sdxl",
            {
                "scheduled_sampling_max_step_offset": 4,
                "scheduled_sampling_probability": 0.5,
            },
            {
                "scheduled_sampling_max_step_offset": 4,
                "scheduled_sampling_probability": 0.5,
                "scheduled_sampling_sampler": "dpm",
            },
            "scheduled_sampling_sampler: was unipc, now dpm",
        ),
        (
            "sdxl",
            {},
            {"disable_segmented_timestep_sampling": True},
            "disable_segmented_timestep_sampling: was false, now true",
        ),
        ("flux", {}, {"flux_guidance_value": 3.5}, "flux_guidance_value: was 1, now 3.5"),
        (
            "flux",
            {},
            {"flux_guidance_mode": "random-range"},
            "flux_guidance_max: was unused, now 4; flux_guidance_min: was unused, now 0;"
            " flux_guidance_mode: was constant, now random-range; flux_guidance_value: was 1,"
            " now unused",
        ),
        (
            "sd3",
            {},
            {"flow_use_uniform_schedule": True},
            "flow_sigmoid_scale: was 1, now unused; flow_use_uniform_schedule: was false, now true",
        ),
        (
            "sd3",
            {},
            {"flow_schedule_auto_shift": True},
            "flow_schedule_auto_shift: was false, now true; flow_schedule_shift: was 3, now unused",
        ),
    ],
)
def test_a_setting_that_may_change_is_told_with_both_values(
    knows: Knows, family: str, before: Changes, after: Changes, told: str
) -> None:
    was, now = knows(family, **before), knows(family, **after)
    check_model(was.model, now.model)
    assert check_data(was.data, now.data, "refuse") == ""
    text = settings_told(was.settings, now.settings)
    assert text.startswith("changed since the checkpoint: ")
    assert told in text


def test_another_loss_is_told(knows: Knows) -> None:
    now = knows("sdxl").settings
    assert settings_told({**now, "loss_type": "l1"}, now) == (
        "changed since the checkpoint: loss_type: was l1, now l2"
    )


def test_all_that_changed_is_told_at_once(knows: Knows) -> None:
    now = knows("sdxl", learning_rate=1e-4, lora_dropout=0.2).settings
    assert settings_told(knows("sdxl").settings, now) == (
        "changed since the checkpoint: learning_rate: was 0.001, now 0.0001; lora_dropout: was 0,"
        " now 0.2"
    )


# --- what changes nothing ----------------------------------------------------------------------

WHOLE = MappingProxyType({"crop": False, "resolution": 64, "resolution_type": "pixel"})
"""Nothing is cut off any picture."""


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        ("sdxl", {}, {}),
        ("sd3", {}, {}),
        ("sdxl", FLAT, {**FLAT, "max_train_steps": 9}),
        ("sdxl", {}, {"vae_dtype": "fp32"}),
        ("sdxl", {}, {"adam_weight_decay": 0.01, "adam_epsilon": 1e-6}),
        ("sdxl", {}, {"optimizer_config": {"betas": [0.9, 0.999]}}),
        ("sdxl", {}, {"lora_alpha": 4, "num_train_epochs": 0}),
        ("sdxl", {"max_grad_norm": 0}, {"max_grad_norm": 0, "grad_clip_method": "value"}),
        ("sdxl", {}, {"base_model_default_dtype": "fp32", "image_background": "#FFFFFF"}),
        ("sdxl", {}, {"gradient_checkpointing": True, "validation_seed": 3}),
        ("sdxl", {}, {"dataset": {"maximum_image_size": 900, "target_downsample_size": 800}}),
        ("sdxl", {"dataset": WHOLE}, {"dataset": {**WHOLE, "crop_style": "center"}}),
        ("sd3", {}, {"sd3_t5_uncond_behaviour": "empty_string", "tokenizer_max_length": 154}),
    ],
)
def test_what_has_no_effect_is_neither_refused_nor_told(
    knows: Knows, family: str, before: Changes, after: Changes
) -> None:
    was, now = knows(family, **before), knows(family, **after)
    check_model(was.model, now.model)
    assert check_data(was.data, now.data, "refuse") == ""
    assert settings_told(was.settings, now.settings) == ""


def test_a_folder_of_another_name_with_the_same_pictures_changes_nothing(
    knows: Knows, tmp_path: Path
) -> None:
    was = knows("sdxl")
    make_pictures(tmp_path / "first")
    shutil.move(tmp_path / "first", tmp_path / "second")
    now = knows("sdxl", dataset={"instance_data_dir": str(tmp_path / "second")})
    assert now == was


# --- the machine -------------------------------------------------------------------------------


def test_another_machine_is_told_by_what_differs() -> None:
    now = {"versions": versions(), "device": "cpu", "threads": 2}
    assert machine_told(now, now) == ""
    before = {
        "versions": {**versions(), "torch": "1.0", "peft": "0.1"},
        "device": "cuda",
        "threads": 4,
    }
    assert machine_told(before, now) == (
        "not as when the checkpoint was made: CPU threads: was 4, now 2; device: was cuda, now cpu;"
        f" peft: was 0.1, now {versions()['peft']}; torch: was 1.0, now {versions()['torch']}:"
        " results may differ in the last digits"
    )
