"""Contradictions in which models and modules the user names to train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from simpletuner.adapters.settings import ANY_DENOISER
from simpletuner.config.proposal import Check, Proposal
from simpletuner.core.errors import Problem
from simpletuner.models.families import FAMILIES
from simpletuner.optim.optimizers import OPTIMIZERS

_WHOLE, _LORA = "trainable_models", "lora_base_model"
_RATE = "trainable_models_lr"

_OTHERS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            ("text_encoder", "text_encoder_2", "text_encoder_3"),
            "trains by a LoRA alone, beside one of the denoiser: set train_text_encoder",
        ),
        "controlnet": "trains alone: set controlnet and model_type full",
        "vae": "stays as it is, for what it encodes is kept",
    }
)
"""Models that are no denoiser, and what to say of them."""


def _denoiser(run: Proposal) -> str | None:
    """The pipeline's name of the denoiser; None of a family that is not built."""
    family = run.values.get("model_family", "")
    found: str | None = FAMILIES[family].fact("denoiser") if family in FAMILIES else None
    return found


def lora_is_of_the_denoiser(run: Proposal) -> Iterator[Problem]:
    """The model that gets the LoRA is one that can, and there is a LoRA."""
    name, denoiser, values = run.says(_LORA), _denoiser(run), run.values
    if not name or denoiser is None:
        return
    if name in _OTHERS:
        yield run.problem(_LORA, f"{name} {_OTHERS[name]}; remove it here")
    elif name not in (denoiser, ANY_DENOISER):
        yield run.problem(
            _LORA,
            f"{values['model_family']} has no model {name!r} that takes a LoRA; write {denoiser},"
            " or remove it",
        )
    elif values["model_type"] != "lora":
        yield run.problem(
            _LORA,
            f"asks for a LoRA, and model_type {values['model_type']} trains none; remove it, or set"
            " model_type lora",
        )


def named_models_can_train(run: Proposal) -> Iterator[Problem]:
    """What trains whole is of the denoiser, and goes with the method and its file."""
    names, denoiser, values = run.says(_WHOLE), _denoiser(run), run.values
    if not names or denoiser is None:
        return
    for name in names:
        model = name.partition(".")[0]
        if model in _OTHERS:
            yield run.problem(_WHOLE, f"{model} {_OTHERS[model]}; remove it here")
    if values["controlnet"]:
        yield run.problem(
            _WHOLE, "names parts of the denoiser, which stays as it is beside controlnet; remove it"
        )
    elif values["model_type"] == "lora":
        yield from _beside_an_adapter(run, names, denoiser)


def _beside_an_adapter(run: Proposal, names: tuple[str, ...], denoiser: str) -> Iterator[Problem]:
    for name in names:
        if name in (denoiser, ANY_DENOISER):
            yield run.problem(
                _WHOLE,
                f"{name} is all of the denoiser, and a LoRA is one of weights that stay; set"
                " model_type full without lora_base_model, or name modules of it, such as"
                f" {denoiser}.conv_in",
            )
    if run.values["lora_type"] != "standard":
        yield run.problem(
            _WHOLE,
            f"goes beside a plain LoRA, and not beside lora_type {run.values['lora_type']}; remove"
            " one of the two",
        )
    if run.values["lora_format"] == "kohya":
        yield run.problem(
            "lora_format",
            f"kohya's layout has no place for the weights of {_WHOLE}; take diffusers or comfyui",
        )


def rate_of_named_models(run: Proposal) -> Iterator[Problem]:
    """A rate of their own is asked where they train beside others, of an optimizer of several."""
    rate, optimizer, values = run.values[_RATE], run.values["optimizer"], run.values
    if rate is None:
        return
    row = OPTIMIZERS.get(optimizer) if optimizer in OPTIMIZERS else None
    if not values[_WHOLE] or values["model_type"] != "lora":
        yield run.problem(
            _RATE, f"changes nothing without {_WHOLE} beside a LoRA; set learning_rate in its place"
        )
    elif row is not None and row.fact("own_rate") and rate != values["learning_rate"]:
        yield run.problem(
            _RATE, f"{optimizer} finds one rate for all that trains; remove it, or take another"
        )


NAMED_CHECKS: tuple[Check, ...] = (
    lora_is_of_the_denoiser,
    named_models_can_train,
    rate_of_named_models,
)
