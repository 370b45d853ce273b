"""Buckets: pictures of exactly one size, so that any of them can share a batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def group(
    sizes: NDArray[np.int32] | NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct sizes and which of them each picture has.

    Args:
        sizes: [n, 2] width, height.

    Returns:
        [b, 2] the sizes, sorted; [n] each picture's number among them.
    """
    packed = sizes[:, 0].astype(np.int64) << 32 | sizes[:, 1].astype(np.int64)
    distinct, number = np.unique(packed, return_inverse=True)
    return np.stack((distinct >> 32, distinct & 0xFFFFFFFF), axis=1), number.reshape(-1)


def describe(sizes: NDArray[np.int32], most: int = 6) -> str:
    """``"3 sizes: 1024x1024 (80), 1280x832 (12), 832x1280 (4)"``, the fullest first."""
    distinct, number = group(sizes)
    counts = np.bincount(number, minlength=len(distinct))
    order = np.argsort(-counts, kind="stable")
    shown = ", ".join(f"{distinct[i, 0]}x{distinct[i, 1]} ({counts[i]})" for i in order[:most])
    more = f" and {len(order) - most} more" if len(order) > most else ""
    return f"{len(order)} size{'s' * (len(order) != 1)}: {shown}{more}"
