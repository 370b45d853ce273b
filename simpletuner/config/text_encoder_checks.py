"""Contradictions in whether and how text encoders train."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.proposal import Check, Proposal
from simpletuner.core.errors import Problem
from simpletuner.models.families import FAMILIES
from simpletuner.optim.optimizers import OPTIMIZERS

_KEY = "train_text_encoder"
_PRECISIONS = {
    "text_encoder": "text_encoder_1_precision",
    "text_encoder_2": "text_encoder_2_precision",
}


def text_encoders_can_train(run: Proposal) -> Iterator[Problem]:
    """Text encoders get a plain LoRA, beside one of the denoiser, in families that can."""
    family, values = run.values.get("model_family", ""), run.values
    if not values[_KEY]:
        return
    able = [name for name, row in FAMILIES.items() if row.fact("trained_text", ())]
    if family in FAMILIES and not FAMILIES[family].pending and family not in able:
        yield run.problem(
            _KEY, f"cannot be done for {family}, only for {' and '.join(able)}; remove it"
        )
    if values["controlnet"]:
        yield run.problem(
            _KEY, "a ControlNet is trained with the text encoders as they are; remove it"
        )
    elif values["model_type"] == "full":
        yield run.problem(
            _KEY,
            "is a LoRA of the text encoders beside one of the denoiser, and model_type full trains"
            " the denoiser alone; remove it, or set model_type lora",
        )
    elif values["lora_type"] != "standard":
        yield run.problem(
            _KEY,
            f"is a plain LoRA, and lora_type {values['lora_type']} is for the denoiser alone;"
            " remove it, or set lora_type standard",
        )


def trained_encoders_are_whole(run: Proposal) -> Iterator[Problem]:
    """Text encoders that train are not quantised: they are small, and learn by small steps."""
    family = run.values.get("model_family", "")
    if not run.values[_KEY] or family not in FAMILIES:
        return
    for part in FAMILIES[family].fact("trained_text", ()):
        key = _PRECISIONS[part]
        if run.values[key] != "no_change":
            yield run.problem(key, f"is of a text encoder that {_KEY} trains; remove one of them")


def captions_are_not_kept(run: Proposal) -> Iterator[Problem]:
    """What changes with every step is not cached."""
    if run.values[_KEY] and run.values["text_cache_ondemand"]:
        yield run.problem(
            "text_cache_ondemand",
            f"keeps what a caption was encoded to, and {_KEY} changes that with every step; remove"
            " one of them",
        )


def rate_of_text_encoders(run: Proposal) -> Iterator[Problem]:
    """A rate of their own is asked where they train, of an optimizer that takes several."""
    key, optimizer = "text_encoder_lr", run.values["optimizer"]
    rate = run.values[key]
    if rate is None:
        return
    row = OPTIMIZERS.get(optimizer) if optimizer in OPTIMIZERS else None
    if not run.values[_KEY]:
        yield run.problem(key, f"changes nothing without {_KEY}; set that, or remove this")
    elif row is not None and row.fact("own_rate") and rate != run.values["learning_rate"]:
        yield run.problem(
            key, f"{optimizer} finds one rate for all that trains; remove it, or take another"
        )


TEXT_ENCODER_CHECKS: tuple[Check, ...] = (
    text_encoders_can_train,
    trained_encoders_are_whole,
    captions_are_not_kept,
    rate_of_text_encoders,
)
