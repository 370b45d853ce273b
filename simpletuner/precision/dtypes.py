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


def run_dtype(settings: PrecisionSettings) -> torch.dtype:
    """What the denoiser computes in."""
    return dtype_of(settings.mixed_precision)


def base_dtype(settings: PrecisionSettings) -> torch.dtype:
    """What the frozen weights are held in: fp32 without mixed precision."""
    if settings.mixed_precision == "no":
        return torch.float32
    return dtype_of(settings.base_model_default_dtype)
