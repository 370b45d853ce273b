from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from simpletuner.data.buckets import merge, rare

SQUARE, WIDE, TALL = (1024, 1024), (1280, 832), (832, 1280)
NEAR_WIDE, LESS_NEAR = (1216, 832), (1216, 896)


def buckets(*groups: tuple[tuple[int, int], int]) -> NDArray[np.int64]:
    """[n, 2]: each size as often as it says."""
    return np.array([size for size, count in groups for _ in range(count)])


def test_a_bucket_is_rare_below_the_number() -> None:
    sizes = buckets((SQUARE, 4), (WIDE, 3), (TALL, 1))
    assert rare(sizes, 4).tolist() == [False] * 4 + [True] * 4
    assert not rare(sizes, 1).any()


def test_a_rare_bucket_joins_the_nearest_full_one() -> None:
    sizes = buckets((LESS_NEAR, 2), (WIDE, 4), (SQUARE, 4), (NEAR_WIDE, 4))
    merged = merge(sizes, sizes, 4)
    assert merged[:2].tolist() == [list(NEAR_WIDE)] * 2
    assert np.array_equal(merged[2:], sizes[2:])


def test_a_rare_bucket_stays_where_nothing_is_near() -> None:
    far = buckets((SQUARE, 8), (TALL, 1))
    assert np.array_equal(merge(far, far, 4), far)
    # The same shape at half the area is no near one.
    small = buckets((SQUARE, 8), ((704, 704), 1))
    assert np.array_equal(merge(small, small, 4), small)
    # Two rare ones do not chase each other.
    both = buckets((WIDE, 1), (NEAR_WIDE, 1))
    assert np.array_equal(merge(both, both, 4), both)


def test_a_rare_bucket_stays_where_one_of_its_pictures_would_grow_too_much() -> None:
    sizes = buckets((WIDE, 4), (NEAR_WIDE, 2))
    files = buckets(((2560, 1664), 5), ((1240, 840), 1))
    assert merge(sizes, files, 4)[-1].tolist() == list(WIDE)
    assert merge(sizes, files, 4, most_enlarged=0.04)[-1].tolist() == list(WIDE)
    assert np.array_equal(merge(sizes, files, 4, most_enlarged=0.03), sizes)


def test_ten_thousand_rare_buckets_are_merged_in_a_moment() -> None:
    numbers = np.arange(1_000_000)
    sizes = np.stack((512 + 8 * (numbers % 100), 512 + 8 * (numbers % 101)), axis=1)
    begin = time.perf_counter()
    merged = merge(sizes, sizes, 100)
    assert time.perf_counter() - begin < 5
    assert (merged != sizes).any()
