"""What the weights of a run are held in, and where they are opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from simpletuner.core.types import Place
from simpletuner.optim.optimizers import OPTIMIZERS
from simpletuner.precision.dtypes import base_dtype

if TYPE_CHECKING:
    from simpletuner.config.root import Config


def held_in(config: Config) -> torch.dtype:
    """The denoiser's own dtype: where it trains itself, fp32 but for optimizers made for bf16."""
    held = base_dtype(config.precision)
    able = OPTIMIZERS[config.optimizer.optimizer].fact("bf16_weights", False)
    if config.adapter.trains == "full" and not (able and held == torch.bfloat16):
        return torch.float32
    return held


def opened_at(config: Config, place: Place) -> Place:
    """Where the denoiser is opened: on the CPU if not all of it ever is on the device at once."""
    device = torch.device("cpu") if config.precision.offloads else place.device
    return Place(device, held_in(config))
