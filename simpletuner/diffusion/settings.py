"""What the model learns to predict: noise, timesteps and the loss."""

from __future__ import annotations

from typing import Literal

from simpletuner.core.section import Section, setting
from simpletuner.diffusion.losses import LOSSES


class DiffusionSettings(Section):
    """The training objective."""

    loss_type: str = setting("l2", table=LOSSES)
    """How far a prediction is from its target."""

    huber_schedule: Literal["snr", "exponential", "constant"] = setting("snr", pending=True)
    """How huber_c changes with the noise level."""

    huber_c: float = setting(0.1, pending=True, gt=0)
    """Where the Huber losses turn from square to linear; smaller heeds outliers less."""

    snr_gamma: float | None = setting(None, pending=True, gt=0)
    """Min-SNR weighting: caps the weight of little-noised samples; smaller caps more, 5 is
    usual."""

    snr_weight: float = setting(1.0, pending=True, ge=0)
    """Factor on the min-SNR weights."""

    offset_noise: bool = setting(False, pending=True)
    """Shift the noise of a whole picture, so that the model learns very dark and bright ones."""

    noise_offset: float = setting(0.1, pending=True, ge=0, le=1)
    """How far offset_noise shifts; larger gives more contrast."""

    noise_offset_probability: float = setting(0.25, pending=True, ge=0, le=1)
    """The share of steps that offset_noise acts in."""

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

    flow_use_beta_schedule: bool = setting(False, pending=True)
    """Draw a flow model's noise levels from a Beta distribution."""

    flow_beta_schedule_alpha: float = setting(2.0, pending=True, gt=0)
    """The Beta distribution's α; larger draws more noise."""

    flow_beta_schedule_beta: float = setting(2.0, pending=True, gt=0)
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
