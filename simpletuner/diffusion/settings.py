"""What the model learns to predict: noise, timesteps and the loss."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from simpletuner.core.section import Section, items, setting
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

    refiner_training: bool = setting(False)
    """Train an expert for the end of the sampling: only at the timesteps of least noise."""

    refiner_training_strength: float = setting(0.2, gt=0, lt=1)
    """The share of the schedule that refiner_training trains."""

    refiner_training_invert_schedule: bool = setting(False)
    """Train the other share of the schedule instead: the timesteps of most noise, which the base
    model samples before a refiner takes over."""

    disable_segmented_timestep_sampling: bool = setting(False)
    """Draw each sample's timestep on its own, instead of one from each equal part of the schedule;
    the loss varies more."""

    flow_schedule_shift: float = setting(3.0, ge=0)
    """Moves a flow model's training towards much noise; larger moves further, 1 or 0 not at all,
    between them towards little noise."""

    flow_cubic_schedule_weights: tuple[float, ...] | None = setting(None, min_length=2)
    """Draw a flow model's noise levels by a smooth curve through these weights, which stand at
    equal distances from no noise to nothing but noise."""

    flow_custom_timesteps: tuple[float, ...] | None = setting(None, min_length=1)
    """Train a flow model at these timesteps alone: of 0 to 1000, or if all are at most 1, as shares
    of noise. They are not shifted."""

    flow_timesteps_mode: Literal["fixed-list", "round-robin"] = setting("fixed-list")
    """Whether flow_custom_timesteps are drawn, or taken in their order."""

    flux_fast_schedule: bool = setting(False)
    """Train FLUX on the four timesteps that schnell samples at, on the first of them seven times as
    often."""

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

    diff2flow_enabled: bool = setting(False)
    """Train a model that predicts noise, v or the clean latent as if it were one of flow matching;
    goes with diff2flow_loss."""

    diff2flow_loss: bool = setting(False)
    """Take the loss on the flow target that the prediction implies: for noise predictions, what has
    much noise weighs more."""

    scheduled_sampling_max_step_offset: int = setting(0, ge=0, lt=1000, unit="timesteps")
    """From how far back the model makes training inputs itself, one prediction for each timestep;
    larger costs more, 0 is off."""

    scheduled_sampling_strategy: Literal["uniform", "biased_early", "biased_late"] = setting(
        "uniform"
    )
    """How the length of a rollout is drawn: all alike, mostly short ones, or mostly long ones."""

    scheduled_sampling_probability: float = setting(0.0, ge=0, le=1)
    """The share of samples that are rolled out."""

    scheduled_sampling_ramp_steps: int = setting(0, ge=0, unit="optimizer steps")
    """Over so many steps the share goes from scheduled_sampling_prob_start to
    scheduled_sampling_prob_end; 0 keeps scheduled_sampling_probability throughout."""

    scheduled_sampling_prob_start: float = setting(0.0, ge=0, le=1)
    """The share before the ramp."""

    scheduled_sampling_prob_end: float = setting(0.5, ge=0, le=1)
    """The share after the ramp."""

    scheduled_sampling_start_step: int = setting(0, ge=0, unit="optimizer steps")
    """When the ramp begins."""

    scheduled_sampling_ramp_shape: Literal["linear", "cosine"] = setting("linear")
    """The curve of the ramp."""

    scheduled_sampling_sampler: Literal["unipc", "euler", "dpm"] = setting("unipc")
    """The solver of the rollout."""

    scheduled_sampling_order: int = setting(2, ge=1, le=2)
    """The order of unipc or dpm; 2 also heeds the prediction before the last."""

    @property
    def flow_levels(self) -> tuple[float, ...]:
        """The only noise levels that are trained, as shares of noise; empty for a whole range."""
        if self.flux_fast_schedule:
            return (1.0,) * 7 + (0.75, 0.5, 0.25)
        chosen = self.flow_custom_timesteps or ()
        return chosen if max(chosen, default=0) <= 1 else tuple(t / 1000 for t in chosen)

    @field_validator("flow_cubic_schedule_weights", "flow_custom_timesteps", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return None if value is None else items(value)

    @field_validator("flow_cubic_schedule_weights")
    @classmethod
    def _is_a_density(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and (min(value) < 0 or max(value) <= 0):
            raise ValueError("weights are not below 0, and one of them is above")
        return value

    @field_validator("flow_custom_timesteps")
    @classmethod
    def _are_timesteps(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and not 0 <= min(value) <= max(value) <= 1000:
            raise ValueError("timesteps are from 0 to 1000")
        return value
