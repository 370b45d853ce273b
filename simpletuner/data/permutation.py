"""Hashes of numbers and a keyed permutation, computed where they are asked for.

numpy does not promise that its random streams stay the same; these do.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15


def mix(values: U64, salt: int) -> U64:
    """The finaliser of splitmix64 (Steele et al. 2014) over `values` ^ `salt`."""
    x = values ^ np.uint64(salt)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fractions(values: U64, salt: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) that depend on `values` and `salt`."""
    return (mix(values, salt) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permuted(places: I64, count: int, key: int) -> I64:
    """Where a keyed permutation of 0 … count - 1 takes some places; nothing of it is held.

    A balanced Feistel network over the next even number of bits, walked along its cycle until it
    comes back below `count` (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", 3).

    Args:
        places: Each in 0 … count - 1.
        count: At least 1.
        key: 64 bits.
    """
    half = max((max(count - 1, 1).bit_length() + 1) // 2, 1)
    found = places.astype(np.uint64)
    walking = np.arange(len(found))
    while len(walking):
        found[walking] = _round_trip(found[walking], half, key)
        walking = walking[found[walking] >= np.uint64(count)]
    return found.astype(np.int64)


def _round_trip(values: U64, half: int, key: int) -> U64:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for number in range(1, _ROUNDS + 1):
        salt = (key + number * _GOLDEN) & 0xFFFFFFFFFFFFFFFF
        left, right = right, left ^ (mix(right, salt) & mask)
    return left << shift | right
