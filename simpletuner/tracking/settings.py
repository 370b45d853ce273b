"""Who is told about a run, besides the console and events.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import field_validator

from simpletuner.core.section import Section, setting

Tracker = Literal["wandb", "tensorboard", "simpletuner", "swanlab", "comet_ml", "all"]


class TrackingSettings(Section):
    """Trackers and webhooks."""

    report_to: tuple[Tracker, ...] = setting((), pending=get_args(Tracker))
    """The trackers that are told of losses and pictures: a list, or names with commas between;
    none for nobody."""

    tracker_project_name: str = setting("simpletuner", pending=True)
    """The project a tracker files the run under."""

    tracker_run_name: str = setting("simpletuner-testing", pending=True)
    """The name a tracker gives the run."""

    tracker_image_layout: Literal["gallery", "table"] = setting("gallery", pending=True)
    """How a tracker lays validation pictures out."""

    logging_dir: Path = setting(Path("logs"), pending=True)
    """The folder inside output_dir that TensorBoard reads."""

    webhook_config: Path | dict[str, Any] | tuple[dict[str, Any], ...] | None = setting(
        None, pending=True, path=True
    )
    """Where events are sent: a JSON file, or its object or list; without it, nowhere."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, list | tuple):
            return value
        plain = [name.strip() if isinstance(name, str) else name for name in names]
        return tuple(name for name in plain if name not in ("", "none"))
