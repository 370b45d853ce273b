"""Activations that wait for the backward pass in the computer's memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from simpletuner.precision.around import around

if TYPE_CHECKING:
    from torch import nn

Get = Callable[[], Tensor]


def save_aside(module: nn.Module) -> None:
    """Keep what the forward pass of `module` saves in the computer's memory, weights aside.

    Of a checkpointed block that is what goes into it; what it recomputes stays on the device.
    torch's ``save_on_cpu`` would copy the weights as well, and knows no ``meta`` tensors.

    Args:
        module: The outermost one of a forward pass.
    """
    around(module, lambda: saved_tensors_hooks(_aside, lambda get: get()))


def _aside(tensor: Tensor) -> Get:
    if _is_weight(tensor):
        same = tensor.detach()  # torch asks that a hook keeps no tensor of the graph itself
        return lambda: same
    if tensor.is_meta:  # an estimate: there is nothing to copy, and nothing may stay
        return partial(
            torch.empty_strided, tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
        )
    copy, device = tensor.detach().to("cpu", copy=True), tensor.device
    return lambda: copy.to(device)


def _is_weight(tensor: Tensor) -> bool:
    """True for a parameter, a view of one, and what quantised weights are made of."""
    owner = tensor._base if tensor._base is not None else tensor
    return isinstance(owner, torch.nn.Parameter) or type(tensor) is not Tensor
