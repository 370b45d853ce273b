"""What each optimizer takes under optimizer_config."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from simpletuner.core.section import Section, setting

Beta = Annotated[float, Field(ge=0, lt=1)]


class DecayOptions(Section):
    """What every optimizer takes; without a value, the number of the optimizer's row."""

    weight_decay: float | None = setting(None, ge=0)
    """The same as adam_weight_decay."""


class AdamOptions(DecayOptions):
    """What Adam and AdamW take."""

    betas: tuple[Beta, Beta] | None = setting(None)
    """The same as optimizer_beta1 and optimizer_beta2."""

    eps: float | None = setting(None, gt=0)
    """The same as adam_epsilon."""


class LionOptions(DecayOptions):
    """What Lion takes; it divides by nothing and so has no eps."""

    betas: tuple[Beta, Beta] | None = setting(None)
    """The same as optimizer_beta1 and optimizer_beta2."""


class OptimiOptions(DecayOptions):
    """What every optimizer of torch-optimi takes."""

    kahan_sum: bool | None = setting(None)
    """Compensate the rounding of bf16 weights; without a value, wherever weights are bf16."""

    decouple_lr: bool = setting(False)
    """Take weight decay off whole instead of times learning_rate, falling as the rate falls; use a
    far smaller weight decay then."""


class OptimiLionOptions(OptimiOptions, LionOptions):
    """What torch-optimi's Lion takes."""


class OptimiAdamOptions(OptimiOptions, AdamOptions):
    """What torch-optimi's AdamW and StableAdamW take."""


class OptimiAdanOptions(OptimiOptions):
    """What torch-optimi's Adan takes."""

    betas: tuple[Beta, Beta, Beta] | None = setting(None)
    """How slowly the means of gradients, of their changes and of squares follow."""

    eps: float | None = setting(None, gt=0)
    """The same as adam_epsilon."""


class SGDOptions(DecayOptions):
    """What SGD takes."""

    momentum: float = setting(0.0, ge=0, lt=1)
    """The share of the last step that is taken again."""

    nesterov: bool = setting(False)
    """Look ahead along the momentum; only with some."""


class AdafactorOptions(DecayOptions):
    """What PyTorch's Adafactor takes."""

    beta2_decay: float = setting(-0.8, le=0)
    """How the mean of squares grows slower: its weight is 1 − step ^ beta2_decay."""

    d: float = setting(1.0, ge=1)
    """The bound on the root mean square of an update."""


class MuonOptions(DecayOptions):
    """What Muon takes."""

    momentum: float = setting(0.95, ge=0, lt=1)
    """How slowly the running mean of gradients follows."""

    nesterov: bool = setting(True)
    """Look ahead along the momentum."""

    ns_steps: int = setting(5, ge=1, le=99)
    """Steps of the iteration that makes an update orthogonal."""


class Bnb8bitOptions(AdamOptions):
    """What the 8-bit AdamW of bitsandbytes takes."""

    min_8bit_size: int = setting(4096, ge=1)
    """Smaller tensors keep moments of 32 bits."""


class Bnb8bitLionOptions(LionOptions):
    """What the 8-bit Lion of bitsandbytes takes."""

    min_8bit_size: int = setting(4096, ge=1)
    """Smaller tensors keep a momentum of 32 bits."""


class BnbAdEMAMixOptions(DecayOptions):
    """What AdEMAMix of bitsandbytes takes."""

    betas: tuple[Beta, Beta, Beta] | None = setting(None)
    """How slowly the fast mean, the mean of squares and the slow mean follow."""

    eps: float | None = setting(None, gt=0)
    """The same as adam_epsilon."""

    alpha: float = setting(5.0, ge=0)
    """What the slow mean weighs beside the fast one."""


class ProdigyOptions(AdamOptions):
    """What Prodigy takes."""

    d0: float = setting(1e-6, gt=0)
    """The first guess of the rate; raise it only if the rate stays there."""

    d_coef: float = setting(1.0, gt=0)
    """A factor on the rate that is found; the one number to change."""

    use_bias_correction: bool = setting(False)
    """Correct the means for their beginning at 0, as Adam does."""

    safeguard_warmup: bool = setting(False)
    """Keep a warm-up from slowing the search."""

    slice_p: int = setting(1, ge=1)
    """Look at every so many-th weight in the search: larger takes less memory."""


class ScheduleFreeOptions(AdamOptions):
    """What the schedule-free AdamW takes."""

    r: float = setting(0.0, ge=0)
    """The average's weights grow as the step to this power."""

    weight_lr_power: float = setting(2.0, ge=0)
    """The average's weights grow as the largest rate so far to this power."""


class SOAPOptions(AdamOptions):
    """What SOAP takes."""

    precondition_frequency: int = setting(10, ge=1, unit="optimizer steps")
    """How often the eigenbasis is brought up to date."""

    max_precondition_dim: int = setting(10000, ge=1)
    """Larger sides of a matrix get no basis; its memory is the square of the side."""


class CAMEOptions(DecayOptions):
    """What CAME takes."""

    betas: tuple[Beta, Beta, Beta] | None = setting(None)
    """How slowly the means of gradients, of squares and of instability follow."""

    clip_threshold: float = setting(1.0, gt=0)
    """The bound on the root mean square of an update."""
