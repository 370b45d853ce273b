"""What the settings of precision may not say together, or on this machine."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.proposal import Check, Proposal
from simpletuner.core.errors import Problem
from simpletuner.precision.quantisers import QUANTISERS, quantised_in

QUANTISED_PARTS = (
    "base_model_precision",
    "text_encoder_1_precision",
    "text_encoder_2_precision",
    "text_encoder_3_precision",
)
"""The settings that name a row of QUANTISERS."""


def base_is_held_in_what_computes(run: Proposal) -> Iterator[Problem]:
    """Frozen weights are exact, or of the dtype that the model computes in."""
    key, mixed = "base_model_default_dtype", run.values["mixed_precision"]
    held = run.says(key)
    if mixed != "no" and held not in (None, "fp32", mixed):
        yield run.problem(
            key,
            f"{held} does not go with mixed_precision {mixed}: remove it, or set mixed_precision to"
            f" {held}",
        )


def weights_can_be_quantised(run: Proposal) -> Iterator[Problem]:
    """Quantised weights are frozen, and their format works on this machine."""
    mixed = run.values["mixed_precision"]
    for key in QUANTISED_PARTS:
        name = run.values[key]
        if name == "no_change" or name not in QUANTISERS:
            continue
        if why := quantised_in(name, run.device, "fp32" if mixed == "no" else mixed):
            yield run.problem(key, why)
        held = run.says("base_model_default_dtype")
        mixes = key == "base_model_precision" and mixed != "no" and held == "fp32"
        if mixes and QUANTISERS[name].fact("one_dtype", False):
            yield run.problem(
                "base_model_default_dtype",
                f"{name} computes in the dtype of its base, and fp32 is not mixed_precision"
                f" {mixed}; remove it, or set mixed_precision to no",
            )
        trains_it = run.values["model_type"] == "full" and not run.values["controlnet"]
        if key == "base_model_precision" and trains_it:
            yield run.problem(
                key,
                f"{name} is for frozen weights, and model_type full trains them all; set it to"
                " no_change, or model_type to lora",
            )


PRECISION_CHECKS: tuple[Check, ...] = (
    base_is_held_in_what_computes,
    weights_can_be_quantised,
)
