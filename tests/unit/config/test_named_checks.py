"""Which models and modules the user names to train, and what of it contradicts."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.config.workplace import Workplace


@pytest.mark.parametrize(
    ("line", "model_type", "whole", "targets"),
    [
        # as DiffSynth-Studio's users write it
        ("--trainable_models dit", "full", ("dit",), None),
        (
            "--lora_base_model dit --lora_target_modules to_q,to_k,to_v --lora_rank 32",
            "lora",
            None,
            ("to_q", "to_k", "to_v"),
        ),
        (
            "--trainable_models conv_in,norm1 --lora_base_model dit --lora_target_modules to_q",
            "lora",
            ("conv_in", "norm1"),
            ("to_q",),
        ),
        ("--trainable_models conv_in --model_type lora", "lora", ("conv_in",), None),
        ("--trainable_models unet.conv_in", "full", ("unet.conv_in",), None),
    ],
)
def test_what_is_named_to_train_decides_how(
    place: Workplace,
    line: str,
    model_type: str,
    whole: tuple[str, ...] | None,
    targets: tuple[str, ...] | None,
) -> None:
    place.config()
    loaded = place.load(*line.split())
    adapter = loaded.config.adapter
    assert adapter.model_type == model_type
    assert adapter.trainable_models == whole
    assert adapter.peft_lora_target_modules == targets
    note = "model_type is full: trainable_models, without lora_base_model"
    assert (note in loaded.notes) == (model_type == "full")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"trainable_models": "text_encoder,controlnet", "lora_base_model": "dit"},
            [
                "trainable_models: text_encoder trains by a LoRA alone, beside one of the denoiser:"
                " set train_text_encoder; remove it here",
                "trainable_models: controlnet trains alone: set controlnet and model_type full;"
                " remove it here",
            ],
        ),
        (
            {"trainable_models": "vae"},
            ["trainable_models: vae stays as it is, for what it encodes is kept; remove it here"],
        ),
        (
            {"trainable_models": "unet", "model_type": "lora"},
            [
                "trainable_models: unet is all of the denoiser, and a LoRA is one of weights that"
                " stay; set model_type full without lora_base_model, or name modules of it, such"
                " as unet.conv_in"
            ],
        ),
        (
            {"trainable_models": "conv_in", "model_type": "full", "controlnet": True},
            [
                "trainable_models: names parts of the denoiser, which stays as it is beside"
                " controlnet; remove it"
            ],
        ),
        (
            {
                "trainable_models": "conv_in",
                "model_type": "lora",
                "lora_type": "lycoris",
                "lycoris_config": {"algo": "lokr"},
            },
            [
                "trainable_models: goes beside a plain LoRA, and not beside lora_type lycoris;"
                " remove one of the two"
            ],
        ),
        (
            {"trainable_models": "conv_in", "model_type": "lora", "lora_format": "kohya"},
            [
                "lora_format: kohya's layout has no place for the weights of trainable_models; take"
                " diffusers or comfyui"
            ],
        ),
        (
            {"lora_base_model": "text_encoder"},
            [
                "lora_base_model: text_encoder trains by a LoRA alone, beside one of the denoiser:"
                " set train_text_encoder; remove it here"
            ],
        ),
        (
            {"lora_base_model": "transformer"},
            [
                "lora_base_model: sdxl has no model 'transformer' that takes a LoRA; write unet, or"
                " remove it"
            ],
        ),
        (
            {"lora_base_model": "unet", "model_type": "full"},
            [
                "lora_base_model: asks for a LoRA, and model_type full trains none; remove it, or"
                " set model_type lora"
            ],
        ),
        (
            {"trainable_models": "conv_in", "trainable_models_lr": 1e-5},
            [
                "trainable_models_lr: changes nothing without trainable_models beside a LoRA; set"
                " learning_rate in its place"
            ],
        ),
        (
            {
                "trainable_models": "conv_in",
                "model_type": "lora",
                "trainable_models_lr": 0.5,
                "learning_rate": 1,
                "optimizer": "prodigy",
            },
            [
                "trainable_models_lr: prodigy finds one rate for all that trains; remove it, or"
                " take another"
            ],
        ),
    ],
)
def test_what_cannot_train_so_is_refused(
    place: Workplace, settings: dict[str, Any], said: list[str]
) -> None:
    place.config(**settings)
    if settings.get("controlnet"):  # which has more to ask for
        assert set(said) <= set(place.messages())
    else:
        assert place.messages() == said


def test_the_denoiser_is_called_as_the_familys_pipeline_calls_it(place: Workplace) -> None:
    for name in ("transformer", "dit"):
        place.config(model_family="sd3", lora_base_model=name)
        assert place.messages() == []
