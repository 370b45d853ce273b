"""What the settings of the objective may not say together, or of a family."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.flat import SETTINGS
from simpletuner.config.proposal import Check, Proposal
from simpletuner.core.errors import Problem
from simpletuner.diffusion.losses import LOSSES
from simpletuner.models.families import FAMILIES


def flow_of_family(run: Proposal) -> Iterator[Problem]:
    """Settings of flow matching are asked of a family that is trained by it."""
    family = run.values.get("model_family", "")
    known = FAMILIES[family].fact("prediction_types", ()) if family in FAMILIES else ()
    if not known or "flow_matching" in known:
        return
    for key in run.given:
        if key.startswith("flow_") and run.says(key) != SETTINGS[key].field.default:
            yield run.problem(
                key, f"{family} is not trained by flow matching, so it changes nothing; remove it"
            )


def noise_of_family(run: Proposal) -> Iterator[Problem]:
    """What belongs to the noise of epsilon and v models is not asked of one of flow matching."""
    family = run.values.get("model_family", "")
    known = FAMILIES[family].fact("prediction_types", ()) if family in FAMILIES else ()
    if set(known) != {"flow_matching"}:
        return
    for key, instead in (
        ("snr_gamma", "flow_sigmoid_scale and flow_schedule_shift weigh noise levels"),
        ("use_soft_min_snr", "flow_sigmoid_scale and flow_schedule_shift weigh noise levels"),
        ("offset_noise", "remove it"),
        ("timestep_bias_strategy", "flow_schedule_shift moves training along the schedule"),
        ("refiner_training", "flow_custom_timesteps names the timesteps to train"),
    ):
        if run.says(key) not in (None, SETTINGS[key].field.default):
            yield run.problem(
                key, f"{family} is trained by flow matching, which has no use for it; {instead}"
            )


def one_min_snr(run: Proposal) -> Iterator[Problem]:
    """Samples are weighed by their noise in one way."""
    if run.values["use_soft_min_snr"] and run.asks("snr_gamma"):
        yield run.problem(
            "snr_gamma",
            "use_soft_min_snr takes its cap from soft_min_snr_sigma_data; remove one of the two",
        )


FLOW_LAWS = (
    "flux_fast_schedule",
    "flow_custom_timesteps",
    "flow_cubic_schedule_weights",
    "flow_use_beta_schedule",
    "flow_use_uniform_schedule",
)
"""What takes the place of the logit-normal law of noise levels; the first two are not shifted."""


def flow_settings_agree(run: Proposal) -> Iterator[Problem]:
    """No setting of flow matching makes another one useless."""
    chosen = [key for key in FLOW_LAWS if run.values[key]]
    said = [(key, chosen[0], "says which noise levels are drawn") for key in chosen[1:]]
    if chosen:
        said.append(("flow_sigmoid_scale", chosen[0], "says which noise levels are drawn"))
    if chosen and chosen[0] in FLOW_LAWS[:2]:
        shifts = ("flow_schedule_shift", "flow_schedule_auto_shift")
        said += [(key, chosen[0], "is not shifted") for key in shifts]
    elif run.values["flow_schedule_auto_shift"]:
        shift = ("flow_schedule_shift", "flow_schedule_auto_shift", "takes the shift from the size")
        said.append(shift)
    for key, by, why in said:
        if run.asks(key):
            yield run.problem(key, f"{by} {why}, so this changes nothing; remove one of the two")


def settings_that_need_another(run: Proposal) -> Iterator[Problem]:
    """What only says how something is done is asked together with it."""
    values = run.values
    rounded = values["loss_type"] in LOSSES and LOSSES[values["loss_type"]].fact("c", False)
    part = values["timestep_bias_strategy"]
    for keys, there, what in (
        (("huber_c", "huber_schedule"), rounded, "loss_type huber or smooth_l1"),
        (("noise_offset", "noise_offset_probability"), values["offset_noise"], "offset_noise true"),
        (("input_perturbation_steps",), values["input_perturbation"], "input_perturbation"),
        (
            ("flow_beta_schedule_alpha", "flow_beta_schedule_beta"),
            values["flow_use_beta_schedule"],
            "flow_use_beta_schedule true",
        ),
        (("soft_min_snr_sigma_data",), values["use_soft_min_snr"], "use_soft_min_snr true"),
        (
            ("flux_guidance_min", "flux_guidance_max"),
            values["flux_guidance_mode"] == "random-range",
            "flux_guidance_mode random-range",
        ),
        (
            ("flux_guidance_value",),
            values["flux_guidance_mode"] == "constant",
            "flux_guidance_mode constant",
        ),
        (
            ("refiner_training_strength", "refiner_training_invert_schedule"),
            values["refiner_training"],
            "refiner_training true",
        ),
        (("flow_timesteps_mode",), values["flow_custom_timesteps"], "flow_custom_timesteps"),
        (
            ("disable_segmented_timestep_sampling",),
            values["flow_timesteps_mode"] == "fixed-list",
            "flow_timesteps_mode fixed-list",
        ),
        (("timestep_bias_multiplier",), part != "none", "a timestep_bias_strategy"),
        (
            ("timestep_bias_portion",),
            part in ("earlier", "later"),
            "timestep_bias_strategy earlier or later",
        ),
        (
            ("timestep_bias_begin", "timestep_bias_end"),
            part == "range",
            "timestep_bias_strategy range",
        ),
    ):
        for key in keys:
            if run.asks(key) and not there:
                yield run.problem(key, f"changes nothing without {what}; set that, or remove this")
    for low, high, there in (
        ("timestep_bias_begin", "timestep_bias_end", part == "range"),
        ("flux_guidance_min", "flux_guidance_max", values["flux_guidance_mode"] != "constant"),
    ):
        if there and values[low] >= values[high]:
            yield run.problem(low, f"must be below {high}; swap or correct them")


OF_THE_OBJECTIVE: tuple[Check, ...] = (
    flow_of_family,
    noise_of_family,
    one_min_snr,
    flow_settings_agree,
    settings_that_need_another,
)
