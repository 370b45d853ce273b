"""Buckets: pictures of exactly one size, so that any of them can share a batch."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

NEAR = 0.1
"""A bucket takes in another that differs from it by this share in shape and area at most."""


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


def rare(sizes: NDArray[np.int64], least: int) -> NDArray[np.bool_]:
    """Who is in a bucket of fewer than `least` pictures, [n]; `sizes` are the buckets', [n, 2]."""
    distinct, number = group(sizes)
    few: NDArray[np.bool_] = np.bincount(number, minlength=len(distinct)) < least
    return few[number]


def merge(
    sizes: NDArray[np.int64],
    pictures: NDArray[np.int64],
    least: int,
    *,
    most_enlarged: float = math.inf,
) -> NDArray[np.int64]:
    """The buckets after those with fewer than `least` pictures have joined the nearest fuller one.

    A bucket stays where none is within `NEAR` of its shape and area, or where one of its pictures
    would have to be enlarged too much for it.

    Args:
        sizes: [n, 2] the bucket of each picture.
        pictures: [n, 2] the size of each file.
        least: Pictures of a bucket that is not rare.
        most_enlarged: The share by which a picture may be enlarged.
    """
    distinct, number = group(sizes)
    counts = np.bincount(number, minlength=len(distinct))
    full = distinct[counts >= least]
    smallest = np.full_like(distinct, np.iinfo(np.int64).max)
    np.minimum.at(smallest, number, pictures)
    place = distinct.copy()
    for bucket in np.flatnonzero(counts < least) if len(full) else ():
        away = _distance(full, distinct[bucket])
        away[(full > smallest[bucket] * (1 + most_enlarged)).any(axis=1)] = np.inf
        if away.min() <= math.log1p(NEAR):
            place[bucket] = full[away.argmin()]
    return place[number]


def _distance(sizes: NDArray[np.int64], size: NDArray[np.int64]) -> NDArray[np.float64]:
    """How far each of `sizes` is from `size`: the larger log factor of shape and area."""
    wide, high = np.log(sizes / size).T
    away: NDArray[np.float64] = np.maximum(np.abs(wide - high), np.abs(wide + high))
    return away
