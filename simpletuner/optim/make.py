"""The builders behind the rows of OPTIMIZERS; each takes torch's parameter groups and keywords."""

from __future__ import annotations

from typing import Any

import torch

from simpletuner.core.extras import require
from simpletuner.optim.adamw_bf16 import AdamWBF16

Groups = list[dict[str, Any]]


def adamw_bf16(groups: Groups, *, seed: int, **options: Any) -> torch.optim.Optimizer:
    """Ours."""
    return AdamWBF16(groups, seed=seed, **options)


def torch_adamw(groups: Groups, *, seed: int, **options: Any) -> torch.optim.Optimizer:
    """PyTorch's own; nothing in it is random."""
    return torch.optim.AdamW(groups, **options)


def optimi_adamw(groups: Groups, *, seed: int, **options: Any) -> torch.optim.Optimizer:
    """AdamW of torch-optimi; nothing in it is random."""
    return _optimi("AdamW", groups, options)


def optimi_lion(groups: Groups, *, seed: int, **options: Any) -> torch.optim.Optimizer:
    """Lion of torch-optimi; nothing in it is random."""
    return _optimi("Lion", groups, options)


def _optimi(name: str, groups: Groups, options: dict[str, Any]) -> torch.optim.Optimizer:
    optimi = require("optimi", extra="train", why=f"optimizer optimi-{name.lower()}")
    optimizer: torch.optim.Optimizer = vars(optimi)[name](groups, **options)
    return optimizer
