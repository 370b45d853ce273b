"""What the settings of the objective may not say together, or of a family."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.flat import SETTINGS
from simpletuner.config.proposal import Check, Proposal
from simpletuner.core.errors import Problem
from simpletuner.diffusion.needs import idle, overruled
from simpletuner.models.families import predicted_by


def flow_of_family(run: Proposal) -> Iterator[Problem]:
    """Settings of flow matching are asked of a family that is trained by it."""
    family = run.values.get("model_family", "")
    known = predicted_by(family)
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
    known = predicted_by(family)
    if set(known) != {"flow_matching"}:
        return
    for key, instead in (
        ("snr_gamma", "flow_sigmoid_scale and flow_schedule_shift weigh noise levels"),
        ("use_soft_min_snr", "flow_sigmoid_scale and flow_schedule_shift weigh noise levels"),
        ("offset_noise", "remove it"),
        ("timestep_bias_strategy", "flow_schedule_shift moves training along the schedule"),
        ("diff2flow_enabled", "remove it"),
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


def min_snr_of_flow(run: Proposal) -> Iterator[Problem]:
    """Flow matching weighs samples by its target."""
    for key in ("snr_gamma", "use_soft_min_snr"):
        if run.values["diff2flow_loss"] and run.asks(key):
            yield run.problem(
                key, "diff2flow_loss weighs samples by their noise itself; remove one of the two"
            )


def one_change_of_the_input(run: Proposal) -> Iterator[Problem]:
    """What the model sees beside its target is changed in one way."""
    if run.values["scheduled_sampling_max_step_offset"] and run.asks("input_perturbation"):
        yield run.problem(
            "input_perturbation",
            "scheduled_sampling_max_step_offset already shows the model errors, which are its own;"
            " remove one of the two",
        )


def rollout_happens(run: Proposal) -> Iterator[Problem]:
    """A rollout has a share of the samples, by one of two ways to say it."""
    values = run.values
    ramp = values["scheduled_sampling_ramp_steps"]
    if ramp and run.asks("scheduled_sampling_probability"):
        yield run.problem(
            "scheduled_sampling_probability",
            "with scheduled_sampling_ramp_steps the share goes from scheduled_sampling_prob_start"
            " to scheduled_sampling_prob_end, so this changes nothing; remove it",
        )
    if values["scheduled_sampling_max_step_offset"] and not (
        ramp or values["scheduled_sampling_probability"]
    ):
        yield run.problem(
            "scheduled_sampling_max_step_offset",
            "changes nothing: no sample is rolled out; set scheduled_sampling_probability",
        )


def flow_settings_agree(run: Proposal) -> Iterator[Problem]:
    """No setting of flow matching makes another one useless."""
    for key, by, why in overruled(run.values):
        if run.asks(key):
            yield run.problem(key, f"{by} {why}, so this changes nothing; remove one of the two")


def settings_that_need_another(run: Proposal) -> Iterator[Problem]:
    """What only says how something is done is asked together with it."""
    guided = run.values["flux_guidance_mode"]
    needs = list(idle(run.values))
    if guided != "random-range":
        ends = ("flux_guidance_min", "flux_guidance_max")
        needs += [(key, "flux_guidance_mode random-range") for key in ends]
    if guided != "constant":
        needs.append(("flux_guidance_value", "flux_guidance_mode constant"))
    for key, what in needs:
        if run.asks(key):
            yield run.problem(key, f"changes nothing without {what}; set that, or remove this")


def ranges_have_a_width(run: Proposal) -> Iterator[Problem]:
    """A range begins before it ends."""
    values = run.values
    for low, high, there in (
        ("timestep_bias_begin", "timestep_bias_end", values["timestep_bias_strategy"] == "range"),
        ("flux_guidance_min", "flux_guidance_max", values["flux_guidance_mode"] != "constant"),
    ):
        if there and values[low] >= values[high]:
            yield run.problem(low, f"must be below {high}; swap or correct them")


OF_THE_OBJECTIVE: tuple[Check, ...] = (
    flow_of_family,
    noise_of_family,
    one_min_snr,
    min_snr_of_flow,
    one_change_of_the_input,
    rollout_happens,
    flow_settings_agree,
    settings_that_need_another,
    ranges_have_a_width,
)
