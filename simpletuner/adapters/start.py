"""Adapters that start from the base's own weights instead of from nothing.

With ``scale * B0 @ A0`` a part of the weight W, the layer is W + scale (B A - B0 A0): the base as
it was at first, with B A where it learns most. The papers take the part out of W instead, which is
the same sum; so W stays, and the change is a LoRA of twice the rank for the base as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


def factors(weight: Tensor, rank: int, kind: str) -> tuple[Tensor, Tensor]:
    """A0 [rank, in] and B0 [out, rank], whose product is the part of `weight` that is trained.

    Args:
        weight: [out, in], or a convolution's [out, in, *K].
        rank: Of the adapter; what the weight has less of stays zero.
        kind: ``pissa``: the largest singular values and their vectors (Meng et al. 2024, arXiv
            2404.02948, by a randomised decomposition as there); ``olora``: the first columns of
            its QR decomposition (Büyükakyüz 2024, arXiv 2406.01775).
    """
    flat = weight.detach().float().flatten(1)
    most = min(rank, *flat.shape)
    if kind == "pissa":
        u, s, v = torch.svd_lowrank(flat, min(most + 8, *flat.shape), niter=16)
        root = s[:most].sqrt()
        down, up = root[:, None] * v[:, :most].T, u[:, :most] * root
    else:
        q, r = torch.linalg.qr(flat)
        down, up = r[:most], q[:, :most]
    a, b = flat.new_zeros(rank, flat.shape[1]), flat.new_zeros(flat.shape[0], rank)
    a[:most], b[:, :most] = down, up
    return a, b


def start(layer: Any, adapter: str, held: str, kind: str) -> None:
    """Give the adapters `adapter` and `held` of a peft layer the same start, `held` against it."""
    scale, rank = layer.scaling[adapter], layer.r[adapter]
    a, b = factors(layer.get_base_layer().weight, rank, kind)
    root = scale**0.5
    with torch.no_grad():
        for name in (adapter, held):
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            down.copy_((a / root).view_as(down))
            up.copy_((b / root).view_as(up))
    layer.scaling[held] = -scale
