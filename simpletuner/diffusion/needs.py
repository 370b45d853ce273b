"""Which settings of the objective change nothing beside others: what they need, what overrules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from simpletuner.diffusion.losses import LOSSES

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Need:
    """Settings that do nothing by themselves.

    Args:
        keys: The settings.
        what: What they need, for the message: a setting and perhaps its value.
        holds: True for values that have it.
    """

    keys: tuple[str, ...]
    what: str
    holds: Callable[[Values], object]


def _asked(key: str) -> Callable[[Values], object]:
    return lambda values: values[key]


def _one_of(key: str, *choices: str) -> Callable[[Values], object]:
    return lambda values: values[key] in choices


def _rounded(values: Values) -> object:
    return values["loss_type"] in LOSSES and LOSSES[values["loss_type"]].fact("c", False)


_RAMP = (
    "scheduled_sampling_prob_start",
    "scheduled_sampling_prob_end",
    "scheduled_sampling_start_step",
    "scheduled_sampling_ramp_shape",
)

NEEDS: tuple[Need, ...] = (
    Need(("huber_c", "huber_schedule"), "loss_type huber or smooth_l1", _rounded),
    Need(("soft_min_snr_sigma_data",), "use_soft_min_snr true", _asked("use_soft_min_snr")),
    Need(("noise_offset", "noise_offset_probability"), "offset_noise true", _asked("offset_noise")),
    Need(("input_perturbation_steps",), "input_perturbation", _asked("input_perturbation")),
    Need(
        ("timestep_bias_multiplier",),
        "a timestep_bias_strategy",
        _one_of("timestep_bias_strategy", "earlier", "later", "range"),
    ),
    Need(
        ("timestep_bias_portion",),
        "timestep_bias_strategy earlier or later",
        _one_of("timestep_bias_strategy", "earlier", "later"),
    ),
    Need(
        ("timestep_bias_begin", "timestep_bias_end"),
        "timestep_bias_strategy range",
        _one_of("timestep_bias_strategy", "range"),
    ),
    Need(
        ("refiner_training_strength", "refiner_training_invert_schedule"),
        "refiner_training true",
        _asked("refiner_training"),
    ),
    Need(
        ("flow_beta_schedule_alpha", "flow_beta_schedule_beta"),
        "flow_use_beta_schedule true",
        _asked("flow_use_beta_schedule"),
    ),
    Need(("flow_timesteps_mode",), "flow_custom_timesteps", _asked("flow_custom_timesteps")),
    Need(
        ("disable_segmented_timestep_sampling",),
        "flow_timesteps_mode fixed-list",
        _one_of("flow_timesteps_mode", "fixed-list"),
    ),
    Need(("diff2flow_loss",), "diff2flow_enabled true", _asked("diff2flow_enabled")),
    Need(("diff2flow_enabled",), "diff2flow_loss true", _asked("diff2flow_loss")),
    Need(
        (
            "scheduled_sampling_strategy",
            "scheduled_sampling_probability",
            "scheduled_sampling_ramp_steps",
            "scheduled_sampling_sampler",
        ),
        "scheduled_sampling_max_step_offset",
        _asked("scheduled_sampling_max_step_offset"),
    ),
    Need(_RAMP, "scheduled_sampling_ramp_steps", _asked("scheduled_sampling_ramp_steps")),
    Need(
        ("scheduled_sampling_order",),
        "scheduled_sampling_max_step_offset and a scheduled_sampling_sampler unipc or dpm",
        lambda values: (
            values["scheduled_sampling_max_step_offset"]
            and values["scheduled_sampling_sampler"] != "euler"
        ),
    ),
)


def idle(values: Values) -> Iterator[tuple[str, str]]:
    """The settings that change nothing beside the others, and what each needs.

    Args:
        values: At least every setting of the objective, by its key.
    """
    for need in NEEDS:
        if not need.holds(values):
            yield from ((key, need.what) for key in need.keys)


FLOW_LAWS = (
    "flux_fast_schedule",
    "flow_custom_timesteps",
    "flow_cubic_schedule_weights",
    "flow_use_beta_schedule",
    "flow_use_uniform_schedule",
)
"""What takes the place of the logit-normal law of noise levels; the first two are not shifted."""


def flow_law(values: Values) -> str | None:
    """The setting whose law noise levels are drawn by; None for the logit-normal."""
    return next((key for key in FLOW_LAWS if values[key]), None)


def overruled(values: Values) -> Iterator[tuple[str, str, str]]:
    """Settings of flow matching that another makes useless, that other one, and why.

    Args:
        values: As above.
    """
    law = flow_law(values)
    if law is not None:
        others = (key for key in FLOW_LAWS if values[key] and key != law)
        for key in (*others, "flow_sigmoid_scale"):
            yield key, law, "says which noise levels are drawn"
    if law in FLOW_LAWS[:2]:
        for key in ("flow_schedule_shift", "flow_schedule_auto_shift"):
            yield key, str(law), "is not shifted"
    elif values["flow_schedule_auto_shift"]:
        yield "flow_schedule_shift", "flow_schedule_auto_shift", "takes the shift from the size"
