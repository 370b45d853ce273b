"""How long a run lasts, in what portions, and what it leaves behind on the way."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from simpletuner.core.section import Section, setting

_NOTHING = (None, "", 0, "0")


class ScheduleSettings(Section):
    """Steps, epochs, batches and checkpoints."""

    train_batch_size: int = setting(1, ge=1, le=1_000_000, unit="pictures")
    """Pictures that go through the model at once; larger is steadier and takes more memory."""

    gradient_accumulation_steps: int = setting(1, ge=1, le=1_000_000, unit="batches")
    """Batches whose gradients are averaged into one optimizer step; larger is steadier and
    slower."""

    max_train_steps: int | None = setting(None, ge=0, le=1_000_000_000, unit="optimizer steps")
    """When to stop; given alone it turns num_train_epochs off, 0 leaves the end to it."""

    num_train_epochs: int = setting(1, ge=0, le=1_000_000_000, unit="epochs")
    """How often every picture is seen (times its repeats); 0 leaves the end to max_train_steps."""

    checkpoint_step_interval: int = setting(500, ge=0, unit="optimizer steps")
    """How often a checkpoint is written; larger loses more when the run is cut off, 0 writes one
    at the end only."""

    checkpoints_total_limit: int = setting(5, ge=0, unit="checkpoints")
    """The newest checkpoints that are kept; 0 keeps all."""

    resume_from_checkpoint: str = setting("latest")
    """Where to go on: latest for the newest whole checkpoint if there is one, none for a fresh
    start, or a checkpoint's folder."""

    on_data_change: Literal["refuse", "continue"] = setting("refuse")
    """What happens when a run is resumed and its data or batch sizes are no longer the same:
    refuse names what changed and stops, continue goes on with what is there now."""

    checkpoint_epoch_interval: int | None = setting(None, pending=True, ge=1, unit="epochs")
    """How often a checkpoint is written, in epochs, besides checkpoint_step_interval."""

    checkpointing_rolling_steps: int = setting(0, pending=True, ge=0, unit="optimizer steps")
    """How often a checkpoint is written that the next such one replaces; 0 for never."""

    checkpoints_rolling_total_limit: int = setting(1, pending=True, ge=1, unit="checkpoints")
    """How many of the replaceable checkpoints are kept."""

    strict_epoch_limit: bool = setting(False, pending=True)
    """Stop at the last epoch's end even where steps are left over."""

    disk_low_threshold: str | None = setting(None, pending=True)
    """The free space, such as 10G, below which disk_low_action is taken."""

    disk_low_action: Literal["stop", "wait", "script"] = setting("stop", pending=True)
    """What to do when the disk is nearly full."""

    @field_validator("resume_from_checkpoint", mode="before")
    @classmethod
    def _empty_means_none(cls, value: object) -> object:
        return "none" if value == "" else value

    @model_validator(mode="before")
    @classmethod
    def _steps_alone_turn_epochs_off(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "num_train_epochs" in values:
            return values
        if values.get("max_train_steps") in _NOTHING:
            return values
        return {**values, "num_train_epochs": 0}

    @model_validator(mode="after")
    def _one_end(self) -> ScheduleSettings:
        if self.max_train_steps and self.num_train_epochs:
            raise ValueError(
                f"max_train_steps ({self.max_train_steps}) and num_train_epochs"
                f" ({self.num_train_epochs}) both say when to stop; set one of them to 0"
            )
        if not self.max_train_steps and not self.num_train_epochs:
            raise ValueError("max_train_steps and num_train_epochs are both 0; set one of them")
        return self

    @property
    def window_shape(self) -> dict[str, int]:
        """What one optimizer step is made of."""
        return {
            "train_batch_size": self.train_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
        }
