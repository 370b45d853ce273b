"""Make a model fit its device: recomputed activations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from simpletuner.precision.settings import PrecisionSettings


@dataclass(frozen=True)
class EachNth:
    """Recomputes the activations of every Nth block, and keeps those of the others.

    Args:
        interval: N.
    """

    interval: int
    _places: dict[int, int] = field(default_factory=dict)
    """Where each block comes among all, by its identity; blocks are met in one order."""

    def __call__(self, block: nn.Module, *inputs: Any) -> Any:
        """What diffusers calls for a block in place of the block itself."""
        from torch.utils.checkpoint import checkpoint

        place = self._places.setdefault(id(block), len(self._places))
        if place % self.interval:
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False)


def fit(modules: Iterable[nn.Module], settings: PrecisionSettings) -> None:
    """Apply the memory settings to all that a step calls, adapters attached."""
    if not settings.gradient_checkpointing:
        return
    interval = settings.gradient_checkpointing_interval or 1
    for module in modules:
        if interval == 1:
            module.enable_gradient_checkpointing()  # type: ignore[operator]
        else:
            module.enable_gradient_checkpointing(EachNth(interval))  # type: ignore[operator]
