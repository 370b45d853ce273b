"""The blocks that a model is mostly made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Them with their names, in the order of its modules, as the model's class tells them.

    Gradient checkpointing recomputes each of them as a whole.
    """
    names = getattr(model, "_repeated_blocks", None) or getattr(model, "_no_split_modules", None)
    return [(n, m) for n, m in model.named_modules() if type(m).__name__ in (names or ())]
