"""Make a model fit its device: what is computed twice, and what waits in the computer's memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from simpletuner.precision.compiled import compile_blocks
from simpletuner.precision.saved import save_aside

if TYPE_CHECKING:
    import torch
    from torch import nn

    from simpletuner.precision.settings import PrecisionSettings


@dataclass(frozen=True)
class EachNth:
    """Recomputes the activations of every Nth block, and keeps those of the others.

    Args:
        interval: N.
        whole: Recompute a block to its end, not only to the last tensor that is asked for, so that
            what waits for its end is called.
    """

    interval: int
    whole: bool = False
    _places: dict[int, int] = field(default_factory=dict)
    """Where each block comes among all, by its identity; blocks are met in one order."""

    def __call__(self, block: nn.Module, *inputs: Any) -> Any:
        """What diffusers calls for a block in place of the block itself."""
        from torch.utils.checkpoint import checkpoint

        place = self._places.setdefault(id(block), len(self._places))
        if place % self.interval:
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False, early_stop=not self.whole)


def fit(modules: Iterable[nn.Module], settings: PrecisionSettings, device: torch.device) -> None:
    """Apply the memory settings to all that a step calls, adapters attached.

    Args:
        modules: The denoiser, and what trains beside it; but for text encoders on the CPU where
            `settings` offload.
        settings: What is asked for.
        device: Where a step computes.

    Raises:
        ConfigError: More blocks are to be swapped than there are, or a kernel does not fit.
    """
    models: list[nn.Module] = []
    for module in modules:
        if not hasattr(module, "enable_gradient_checkpointing"):  # a text encoder: small, it stays
            if settings.gradient_checkpointing:
                _recompute_layers(module, settings.gradient_checkpointing_interval or 1)
            continue
        models.append(module)
        if settings.gradient_checkpointing:
            again = EachNth(settings.gradient_checkpointing_interval or 1, settings.offloads)
            module.enable_gradient_checkpointing(again)  # type: ignore[operator]
        if settings.unet_attention_slice:
            module.set_attention_slice("auto")  # type: ignore[operator]
        if settings.dynamo_backend != "no":
            compile_blocks(module, settings)
        if settings.gradient_checkpointing_backend == "unsloth":
            save_aside(module)
        if settings.attention_mechanism != "diffusers":
            from simpletuner.precision.kernels import attend_by

            attend_by(module, settings.attention_mechanism)
    if settings.offloads:
        from simpletuner.precision import offload

        offload.apply(models, settings, device)


def _recompute_layers(model: nn.Module, interval: int) -> None:
    """The same for a model of transformers, whose own switch makes embeddings require gradients."""
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers[::interval]:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
