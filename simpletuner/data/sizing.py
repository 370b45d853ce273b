"""From the sizes of a dataset's pictures to their buckets: who is left out, who joins another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from simpletuner.core.seeds import key64
from simpletuner.data import buckets
from simpletuner.data.geometry import Flags, GeometryRule, Keys, SizeFilter, Sizes
from simpletuner.data.permutation import mix


@dataclass(frozen=True)
class Sizing:
    """How one dataset's pictures are put into buckets.

    Args:
        id: The dataset's name: another one draws other shapes.
        rule: What is done to each picture.
        wanted: Which pictures the user does not want.
        most: So many pictures are used at most.
        rare: What happens to rare buckets: ``keep``, ``merge`` or ``drop``.
        fewest: Pictures of a bucket that is not rare.
        most_enlarged: The share by which a picture may be enlarged to join another bucket.
    """

    id: str
    rule: GeometryRule
    wanted: SizeFilter
    most: int | None
    rare: str
    fewest: int
    most_enlarged: float

    def targets(self, sizes: Sizes, keys: Keys) -> Sizes:
        """The bucket of each picture, [n, 2]; a shape that is drawn depends on its content.

        Args:
            sizes: The oriented size of each file.
            keys: [n] u64 of its content.
        """
        return self.rule.targets(sizes, mix(keys, key64("crop_aspect", self.id)))

    def left_out(self, sizes: Sizes, targets: Sizes, keys: Keys) -> dict[str, Flags]:
        """For each filter that is on: its name and who is left out by it, [n].

        The number is cut after the sizes were looked at, and buckets are rare by what is left then.
        """
        found = self.wanted.left_out(sizes, self.rule.cover_scale(sizes, targets))
        if self.most is not None:
            left = _left(found, len(sizes))
            # Not by the dataset's name, so that each of several resolutions has the same ones.
            drawn = mix(keys[left], key64("max_num_samples"))
            chosen = np.argsort(drawn, kind="stable")[: self.most]
            left[np.flatnonzero(left)[chosen]] = False
            found["max_num_samples"] = left
        if self.rare == "drop":
            left = _left(found, len(sizes))
            left[left] = buckets.rare(targets[left], self.fewest)
            found["rare_buckets"] = left
        return found

    def merged(self, sizes: Sizes, targets: Sizes) -> Sizes:
        """The buckets after rare ones have joined fuller ones, where the user wants that."""
        if self.rare != "merge":
            return targets
        return buckets.merge(targets, sizes, self.fewest, most_enlarged=self.most_enlarged)


def _left(filters: Mapping[str, Flags], count: int) -> Flags:
    """Who none of the filters leaves out, [n]."""
    left = np.ones(count, np.bool_)
    for out in filters.values():
        left &= ~out
    return left
