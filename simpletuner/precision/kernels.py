"""Attention by another kernel than torch's own, while a model is called for pictures.

Letters: B batch, H heads, L tokens, D numbers of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from simpletuner.core.errors import ConfigError
from simpletuner.precision.around import around
from simpletuner.precision.attention import ATTENTION

if TYPE_CHECKING:
    from torch import nn

Attend = Callable[..., Tensor]

_HEADS = (64, 96, 128)
"""The D that sageattention has kernels for."""


class _By(TorchFunctionMode):
    """Sends attention to another kernel.

    Not for what is trained: the mode is off while gradients are computed, and blocks that are
    recomputed there would take the other way.
    """

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self._attend = attend

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, or the kernel in its place."""
        if func is functional.scaled_dot_product_attention:
            func = self._attend
        return func(*args, **(kwargs or {}))


def attend_by(model: nn.Module, name: str) -> None:
    """Let `model` compute attention by the row `name` of ATTENTION when it is held for eval.

    Raises:
        ConfigError: No attention of the model fits the kernel.
    """
    attending = [m for m in model.modules() if hasattr(m, "heads") and hasattr(m, "inner_dim")]
    sizes = {m.inner_dim // m.heads for m in attending}
    if not sizes & set(_HEADS):
        raise ConfigError(
            f"attention_mechanism: {name} computes heads of {_words(_HEADS)} numbers, and this"
            f" model has {_words(sorted(sizes))}",
            fix="remove it: torch's own kernels compute these",
        )
    attend = ATTENTION[name].load()
    around(model, lambda: nullcontext() if model.training else _By(attend))


def _words(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


def sage(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Sageattention (Zhang et al. 2024, arXiv 2410.02367) on [B, H, L, D], in the query's dtype.

    What it has no kernel for, masks and heads of other sizes, goes to torch's own.
    """
    from sageattention import sageattn

    if attn_mask is not None or dropout_p or enable_gqa or query.shape[-1] not in _HEADS:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    dtype = torch.bfloat16 if query.dtype == torch.float32 else query.dtype
    parts = (part.to(dtype).contiguous() for part in (query, key, value))
    answer: Tensor = sageattn(*parts, tensor_layout="HND", is_causal=is_causal, sm_scale=scale)
    return answer.to(query.dtype)
