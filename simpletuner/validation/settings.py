"""Pictures and scores that show whether a run learns."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from simpletuner.core.section import Section, items, setting

_PAIR = re.compile(r"(\d+)\s*[xX×]\s*(\d+)")
_MOST_MEGAPIXELS = 16


class ValidationSettings(Section):
    """Validation pictures, previews, CLIP scores and evaluation losses."""

    validation_prompt: str | None = setting(None)
    """The prompt that is rendered at every validation."""

    user_prompt_library: Path | None = setting(None, path=True)
    """A JSON file with more prompts, each under a name for its pictures: {"name": "prompt"}, or
    {"name": {"prompt": …, "reference": …, "control": …}} with a picture to compare with, or one for
    a ControlNet; paths are relative to the file."""

    validation_negative_prompt: str = setting("blurry, cropped, ugly")
    """What validation pictures shall not show."""

    validation_disable: bool = setting(False)
    """Render no validation pictures."""

    validation_disable_unconditional: bool = setting(False)
    """Leave out the picture of the empty prompt."""

    validation_step_interval: int = setting(100, ge=0, unit="optimizer steps")
    """How often validation pictures are rendered; 0 renders them at the end only."""

    validation_resolution: tuple[tuple[int, int], ...] = setting(((1024, 1024),), min_length=1)
    """The sizes that are rendered: WIDTHxHEIGHT or one edge in px, or megapixels below 16;
    several with commas between or as a list."""

    validation_guidance: float = setting(5.0, ge=0, le=30)
    """How closely pictures follow the prompt (classifier-free guidance); larger follows closer
    and burns colours, 1 or 0 is off."""

    validation_num_inference_steps: int = setting(30, ge=1, le=1000, unit="sampling steps")
    """Steps a picture is rendered in; more takes longer and shows finer detail."""

    validation_seed: int | None = setting(None, ge=0, le=2**31 - 1)
    """The seed of validation pictures; without it, the run's seed."""

    num_validation_images: int = setting(1, ge=1, le=100, unit="pictures")
    """Pictures of each prompt at each size, with consecutive seeds."""

    validation_prompt_library: bool | Path = setting(False, pending=True)
    """Also render a built-in library of prompts."""

    validation_randomize: bool = setting(False, pending=True)
    """Draw new seeds at every validation."""

    validation_epoch_interval: int | None = setting(None, pending=True, ge=1, unit="epochs")
    """How often validation pictures are rendered, in epochs."""

    validate_after_step: int | None = setting(None, pending=True, ge=0, unit="optimizer steps")
    """The step before which nothing is rendered."""

    validation_on_startup: bool = setting(False, pending=True)
    """Render once before the first step."""

    disable_benchmark: bool = setting(False)
    """Render nothing with the untouched base model; otherwise its pictures are made once, at the
    end, and before_after.png shows them beside the trained ones."""

    validation_image_format: Literal["png", "webp", "jpeg"] = setting(
        "png", pending=("webp", "jpeg")
    )
    """The file type of validation pictures."""

    validation_image_quality: int = setting(90, pending=True, ge=1, le=100)
    """The quality of webp and jpeg files; larger is finer and takes more room."""

    validation_noise_scheduler: (
        Literal["ddim", "ddpm", "euler", "euler-a", "unipc", "dpm++", "perflow"] | None
    ) = setting(None, pending=True)
    """The sampler of validation pictures; without it, the base model's own."""

    inference_scheduler_timestep_spacing: Literal["leading", "linspace", "trailing"] | None = (
        setting(None, pending=True)
    )
    """How the sampler's timesteps are spaced; without it, as the base model says."""

    validation_guidance_real: float = setting(1.0, pending=True, ge=1)
    """Classifier-free guidance for models that were distilled from it; 1 is off."""

    validation_guidance_rescale: float = setting(0.0, pending=True, ge=0, le=1)
    """How far guidance is kept from raising the contrast; 0 is off."""

    validation_no_cfg_until_timestep: int = setting(2, pending=True, ge=0, unit="sampling steps")
    """Sampling steps without validation_guidance_real at the beginning."""

    validation_guidance_skip_layers: tuple[int, ...] | None = setting(None, pending=True)
    """The layers that skip-layer guidance leaves out; 7, 8, 9 suit SD3.5 medium."""

    validation_guidance_skip_layers_start: float = setting(0.01, pending=True, ge=0, le=1)
    """The share of sampling after which skip-layer guidance begins."""

    validation_guidance_skip_layers_stop: float = setting(0.2, pending=True, ge=0, le=1)
    """The share of sampling at which skip-layer guidance ends."""

    validation_guidance_skip_scale: float = setting(2.8, pending=True, ge=0)
    """The strength of skip-layer guidance."""

    validation_preview: bool = setting(False, pending=True)
    """Show a picture while it is still being sampled."""

    validation_preview_steps: int = setting(1, pending=True, ge=1, unit="sampling steps")
    """How often a preview is made while sampling; larger costs less."""

    validation_lycoris_strength: float = setting(1.0, pending=True, ge=0)
    """How strongly a LyCORIS adapter acts in validation pictures."""

    validation_multigpu: Literal["batch-parallel", "single-gpu"] = setting(
        "batch-parallel", pending=True
    )
    """Whether several devices share the validation pictures."""

    ema_validation: Literal["none", "ema_only", "comparison"] = setting("comparison", pending=True)
    """Which weights are validated when there is an average of them."""

    evaluation_type: Literal["none", "clip"] = setting("none", pending=("clip",))
    """How validation pictures are scored: clip measures how well they match their prompts."""

    pretrained_evaluation_model_name_or_path: str = setting(
        "openai/clip-vit-large-patch14-336", pending=True
    )
    """The CLIP model that scores: a hub id or a folder."""

    eval_steps_interval: int | None = setting(None, pending=True, ge=1, unit="optimizer steps")
    """How often the loss on the evaluation datasets is measured."""

    eval_epoch_interval: float | None = setting(None, pending=True, gt=0, unit="epochs")
    """How often the loss on the evaluation datasets is measured, in epochs, parts allowed."""

    num_eval_images: int = setting(4, pending=True, ge=1, unit="pictures")
    """Pictures of each evaluation dataset that are measured; more is steadier and slower."""

    eval_timesteps: int = setting(28, pending=True, ge=1)
    """Noise levels each picture is measured at; more is steadier and slower."""

    eval_dataset_pooling: bool = setting(False, pending=True)
    """Report one evaluation loss for all datasets together."""

    eval_loss_disable: bool = setting(False, pending=True)
    """Measure no evaluation loss."""

    eval_dataset_id: str | None = setting(None, pending=True)
    """The dataset that gives validation its inputs."""

    @field_validator("validation_resolution", mode="before")
    @classmethod
    def _sizes(cls, value: object) -> tuple[tuple[int, int], ...]:
        return tuple(_size(item) for item in items(value))

    @field_validator("validation_guidance_skip_layers", mode="before")
    @classmethod
    def _layers(cls, value: object) -> object:
        return items(value) if isinstance(value, str | int) else value


def _size(item: object) -> tuple[int, int]:
    """Width and height in px of one size as the user wrote it."""
    if isinstance(item, list | tuple) and len(item) == 2:
        size = (int(item[0]), int(item[1]))
    elif isinstance(item, str) and (pair := _PAIR.fullmatch(item.strip())):
        size = (int(pair[1]), int(pair[2]))
    else:
        size = _square(item)
    wrong = [edge for edge in size if edge < 8 or edge % 8]
    if wrong:
        near = "x".join(str(max(round(edge / 8), 1) * 8) for edge in size)
        raise ValueError(f"the edges of {size[0]}x{size[1]} must be multiples of 8, as in {near}")
    return size


def _square(item: object) -> tuple[int, int]:
    try:
        number = float(str(item))
    except ValueError:
        raise ValueError(f"{item!r} is no size; write 1024x768, 1024, or a list of them") from None
    if number <= _MOST_MEGAPIXELS:
        number = round(math.sqrt(max(number, 0) * 1e6) / 64) * 64
    return int(number), int(number)
