"""Make a model fit its device: recomputed activations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
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
        if not hasattr(module, "enable_gradient_checkpointing"):
            _recompute_layers(module, interval)
        elif interval == 1:
            module.enable_gradient_checkpointing()  # type: ignore[operator]
        else:
            module.enable_gradient_checkpointing(EachNth(interval))  # type: ignore[operator]


def _recompute_layers(model: nn.Module, interval: int) -> None:
    """The same for a model of transformers, whose own switch makes embeddings require gradients."""
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers[::interval]:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
