"""How gradients become new weights."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import field_validator, model_validator

from simpletuner.core.section import Section, setting
from simpletuner.optim.optimizers import OPTIMIZERS
from simpletuner.optim.schedules import SCHEDULES


class OptimizerSettings(Section):
    """The optimizer, the learning rate and the bounds of a step."""

    optimizer: str = setting("adamw_bf16", table=OPTIMIZERS)
    """The rule that updates the weights."""

    optimizer_config: dict[str, Any] = setting({})
    """Options of the chosen optimizer alone, by name."""

    learning_rate: float = setting(1e-4, gt=0, le=10)
    """How far each step goes; larger learns faster, and too large burns the model."""

    lr_scheduler: str = setting("constant_with_warmup", table=SCHEDULES)
    """How the learning rate changes over the run."""

    lr_warmup_steps: float = setting(0, ge=0, unit="optimizer steps")
    """How long the learning rate rises from 0, in the schedules that have a warm-up; below 1, the
    share of the whole run, such as 0.05."""

    lr_end: float = setting(4e-7, ge=0)
    """The learning rate at the end of a schedule that falls."""

    lr_power: float = setting(0.8, gt=0)
    """The exponent of the polynomial schedule; 1 falls in a straight line, larger falls sooner."""

    lr_num_cycles: int = setting(1, ge=1)
    """How often a schedule with cycles repeats."""

    adam_weight_decay: float | None = setting(None, ge=0)
    """How strongly weights are pulled to 0 in each step, times the learning rate; without it, the
    optimizer's own (0.01 for the AdamW kinds, 0 for Lion)."""

    adam_epsilon: float | None = setting(None, gt=0)
    """The constant that keeps Adam from dividing by 0; larger makes rare gradients count less.
    Without it, the optimizer's own."""

    optimizer_beta1: float | None = setting(None, ge=0, lt=1)
    """How slowly the running mean of gradients follows; without it, the optimizer's own. Only
    together with optimizer_beta2."""

    optimizer_beta2: float | None = setting(None, ge=0, lt=1)
    """How slowly the running mean of squared gradients follows; without it, the optimizer's own.
    Only together with optimizer_beta1."""

    max_grad_norm: float = setting(1.0, ge=0)
    """The bound on gradients; smaller is steadier and slower, 0 is off."""

    grad_clip_method: Literal["norm", "value"] = setting("norm")
    """What max_grad_norm bounds: the length of the whole gradient (norm), or each of its numbers
    (value)."""

    gradient_precision: Literal["unmodified", "fp32"] | None = setting(None)
    """The dtype gradients are summed in over gradient_accumulation_steps; unmodified, as without
    it, is that of the trained weights. fp32 matters where these are bf16 (model_type full): small
    gradients count beside large ones, and take twice the memory."""

    prodigy_steps: int | None = setting(None, ge=1, unit="optimizer steps")
    """How long Prodigy looks for its learning rate; without it, the whole run."""

    text_encoder_lr: float | None = setting(None, gt=0, le=10)
    """The learning rate of the text encoders under train_text_encoder, which lr_scheduler changes
    by the same factor; without it, learning_rate."""

    trainable_models_lr: float | None = setting(None, gt=0, le=10)
    """The learning rate of what trainable_models names beside a LoRA, which lr_scheduler changes by
    the same factor; without it, learning_rate. Whole weights want a smaller one, such as 1e-5."""

    @field_validator("lr_scheduler", mode="before")
    @classmethod
    def _cosine_has_a_warmup(cls, value: object) -> object:
        return "cosine" if value == "cosine_with_warmup" else value

    @field_validator("optimizer_config", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        """Read ``a=1,b=true`` as an object; each value as JSON where it is JSON."""
        if not isinstance(value, str) or value.lstrip().startswith("{"):
            return json.loads(value) if isinstance(value, str) else value
        pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
        if wrong := [name for name, equals, _ in pairs if not equals]:
            raise ValueError(f"{wrong[0].strip()!r} is not name=value")
        return {name.strip(): _json_or_text(text.strip()) for name, _, text in pairs}

    @model_validator(mode="after")
    def _both_betas(self) -> OptimizerSettings:
        if (self.optimizer_beta1 is None) != (self.optimizer_beta2 is None):
            raise ValueError(
                "optimizer_beta1 and optimizer_beta2 come together: set both, or neither for the"
                " optimizer's own"
            )
        return self

    @field_validator("lr_warmup_steps")
    @classmethod
    def _is_a_number_of_steps_or_a_share(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("is a whole number of steps, or a share below 1")
        return int(value) if value == int(value) else value

    def share_of(self, *, text: bool, whole: bool) -> float:
        """The learning rate of some weights as a factor on `learning_rate`.

        Args:
            text: They are of text encoders.
            whole: They train whole beside adapters.
        """
        own = self.text_encoder_lr if text else self.trainable_models_lr if whole else None
        return (own or self.learning_rate) / self.learning_rate

    def warmup_of(self, total: int) -> int:
        """The steps of the warm-up in a run of `total`."""
        share = self.lr_warmup_steps
        return round(share * total) if share < 1 else int(share)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text
