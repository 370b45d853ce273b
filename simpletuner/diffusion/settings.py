"""What the model learns to predict: noise, timesteps and the loss."""

from __future__ import annotations

from typing import Literal

from simpletuner.core.section import Section, setting
from simpletuner.diffusion.losses import HUBER_SCHEDULES, LOSSES


class DiffusionSettings(Section):
    """The training objective."""

    loss_type: str = setting("l2", table=LOSSES)
    """How far a prediction is from its target."""

    huber_schedule: str = setting("snr", table=HUBER_SCHEDULES)
    """How huber_c changes with the noise level."""

    huber_c: float = setting(0.1, gt=0, le=1)
    """Where the Huber losses turn from square to linear; smaller heeds outliers less."""

    snr_gamma: float | None = setting(None, gt=0)
    """Min-SNR weighting of noise and v predictions: caps the weight of little-noised samples;
    smaller caps more, 5 is usual."""

    use_soft_min_snr: bool = setting(False)
    """Min-SNR weighting that bends towards its cap instead of breaking off there; the cap is
    1 / soft_min_snr_sigma_data^2, and snr_gamma is not used."""

    soft_min_snr_sigma_data: float = setting(0.5, ge=0.05, le=20)
    """The noise level (noise over signal) at which use_soft_min_snr begins to hold weights down;
    larger caps more, 0.5 is a cap of 4."""

    mask_normalize: bool = setting(False)
    """Divide a masked loss by the share of the picture that is learned, so that a small mask weighs
    as much as a large one."""

    prior_loss_weight: float = setting(1.0, ge=0)
    """What a picture of a regularisation set weighs beside the others; larger keeps more of what
    the base model knew."""

    offset_noise: bool = setting(False)
    """Shift the noise of a whole picture, so that the model learns very dark and bright ones."""

    noise_offset: float = setting(0.1, ge=0, le=1)
    """How far offset_noise shifts; larger gives more contrast."""

    noise_offset_probability: float = setting(0.25, ge=0, le=1)
    """The share of samples that offset_noise shifts."""

    input_perturbation: float = setting(0.0, ge=0, le=1)
    """How much more noise the model sees than it is asked to predict; 0.1 is usual."""

    input_perturbation_steps: int = setting(0, ge=0, unit="optimizer steps")
    """Over so many steps input_perturbation falls to 0; 0 keeps it throughout."""

    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = setting("none")
    """Which timesteps are drawn more often: the first ones (earlier: little noise), the last ones
    (later: much noise), or those from timestep_bias_begin to timestep_bias_end (range)."""

    timestep_bias_portion: float = setting(0.25, gt=0, lt=1)
    """The share of the schedule that earlier and later favour."""

    timestep_bias_begin: int = setting(0, ge=0, lt=1000)
    """The first timestep that range favours."""

    timestep_bias_end: int = setting(1000, ge=1, le=1000)
    """The first timestep behind those that range favours."""

    timestep_bias_multiplier: float = setting(1.0, gt=0)
    """How often a favoured timestep is drawn for once of another; below 1 they are avoided."""

    training_scheduler_timestep_spacing: Literal["leading", "linspace", "trailing"] | None = (
        setting(None, pending=True)
    )
    """How the training timesteps are spaced; without it, every timestep is as likely."""

    flow_schedule_shift: float = setting(3.0, ge=0)
    """Moves a flow model's training towards much noise; larger moves further, 1 or 0 not at all,
    between them towards little noise."""

    flow_schedule_auto_shift: bool = setting(False)
    """Take the shift from each picture's size instead of flow_schedule_shift: larger ones are
    trained at more noise."""

    flow_use_uniform_schedule: bool = setting(False)
    """Draw a flow model's noise levels evenly, instead of mostly from the middle."""

    flow_sigmoid_scale: float = setting(1.0, gt=0)
    """The width of the draw around the middle; larger reaches further to both ends."""

    flow_use_beta_schedule: bool = setting(False)
    """Draw a flow model's noise levels from a Beta distribution."""

    flow_beta_schedule_alpha: float = setting(2.0, ge=0.5)
    """The Beta distribution's α; larger draws more noise."""

    flow_beta_schedule_beta: float = setting(2.0, ge=0.5)
    """The Beta distribution's β; larger draws less noise."""

    diff2flow_enabled: bool = setting(False, pending=True)
    """Bridge an ε- or v-predicting model to flow matching."""

    diff2flow_loss: bool = setting(False, pending=True)
    """Take the loss on the flow target of the bridge."""

    scheduled_sampling_max_step_offset: int = setting(0, pending=True, ge=0, unit="timesteps")
    """How far back a training input is rolled out by the model itself; larger costs more, 0 is
    off."""

    scheduled_sampling_strategy: Literal["uniform", "biased_early", "biased_late"] = setting(
        "uniform", pending=True
    )
    """How the length of a rollout is drawn."""

    scheduled_sampling_probability: float = setting(0.0, pending=True, ge=0, le=1)
    """The share of samples that are rolled out."""

    scheduled_sampling_prob_start: float = setting(0.0, pending=True, ge=0, le=1)
    """The share where the ramp begins."""

    scheduled_sampling_prob_end: float = setting(0.5, pending=True, ge=0, le=1)
    """The share where the ramp ends."""

    scheduled_sampling_ramp_steps: int = setting(0, pending=True, ge=0, unit="optimizer steps")
    """The length of the ramp; 0 keeps scheduled_sampling_probability throughout."""

    scheduled_sampling_start_step: int = setting(0, pending=True, ge=0, unit="optimizer steps")
    """When the ramp begins."""

    scheduled_sampling_ramp_shape: Literal["linear", "cosine"] = setting("linear", pending=True)
    """The curve of the ramp."""

    scheduled_sampling_sampler: Literal["unipc", "euler", "dpm"] = setting("unipc", pending=True)
    """The solver of the rollout."""

    scheduled_sampling_order: int = setting(2, pending=True, ge=1, le=9)
    """The order of that solver; higher is finer and costs more."""
