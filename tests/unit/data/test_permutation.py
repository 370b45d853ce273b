"""A permutation that is never held: each number once, another order for another key, no pattern."""

from __future__ import annotations

import numpy as np
import pytest

from simpletuner.data.permutation import permuted


@pytest.mark.parametrize("count", [*range(1, 70), 255, 256, 257, 4095, 4096, 4097, 100_003])
def test_every_number_comes_once(count: int) -> None:
    found = permuted(np.arange(count), count, key=count)
    assert np.array_equal(np.sort(found), np.arange(count))


def test_a_place_goes_where_it_goes_whatever_else_is_asked() -> None:
    whole = permuted(np.arange(1000), 1000, key=5)
    for places in ([3], [999, 0], list(range(17, 400, 3))):
        assert permuted(np.array(places), 1000, key=5).tolist() == whole[places].tolist()


def test_another_key_is_another_order() -> None:
    orders = {tuple(permuted(np.arange(50), 50, key=key).tolist()) for key in range(200)}
    assert len(orders) == 200


def test_a_number_is_as_likely_at_every_place() -> None:
    """Chi-square of which 97th of 20,079 one goes to; 96 degrees of freedom, 1 in 10,000 is 154."""
    count, rounds = 97 * 207, 9_700
    at = [int(permuted(np.array([7]), count, key=key * 7919)[0]) // 207 for key in range(rounds)]
    counts = np.bincount(at, minlength=97)
    assert ((counts - 100) ** 2 / 100).sum() < 154


def test_neighbours_do_not_stay_neighbours() -> None:
    """Of a random order one pair in n is one apart, so about two in all; here, over 50 keys."""
    count = 20_000
    steps = [np.diff(permuted(np.arange(count), count, key=key)) for key in range(50)]
    found = sum(int((np.abs(each) == 1).sum()) for each in steps)
    assert 60 < found < 150
