"""The settings' names for dtypes, and which dtype each part of a run gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from simpletuner.precision.settings import PrecisionSettings

_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


def dtype_of(name: str) -> torch.dtype:
    """The dtype a setting names: ``fp32``, ``bf16``, ``fp16``, ``no`` (fp32)."""
    return _NAMES[name]


def short_name(dtype: torch.dtype) -> str:
    """The setting's name for a dtype: ``fp32``, ``bf16`` or ``fp16``."""
    return next(name for name, each in _NAMES.items() if each == dtype)


def run_dtype(settings: PrecisionSettings) -> torch.dtype:
    """What the denoiser computes in."""
    return dtype_of(settings.mixed_precision)


def base_dtype(settings: PrecisionSettings) -> torch.dtype:
    """What the frozen weights are held in; without mixed precision that can only be fp32."""
    mixed = settings.mixed_precision
    return dtype_of(mixed if mixed == "no" else settings.base_model_default_dtype or mixed)


def vae_dtype_of(chosen: str, run: str) -> str:
    """What the VAE computes in: what was chosen, or where that is ``default`` the run's own.

    The range of fp16 is too small for VAEs, SDXL's above all: beside it the default is fp32.
    """
    if chosen != "default":
        return chosen
    return "fp32" if run in ("fp16", "no") else run
