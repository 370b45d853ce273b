"""What is done to each picture between its file and the encoder: one resize, one crop.

Sizes are (width, height) in px, as arrays [n, 2] over a whole dataset; n pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simpletuner.core.types import Geometry
from simpletuner.data.buckets import group

Sizes = NDArray[np.int64]
Keys = NDArray[np.uint64]
Flags = NDArray[np.bool_]
Numbers = NDArray[np.float64]

MILLION = 1_000_000

CHUNK = 1 << 16
"""Pictures whose shapes are weighed at once."""


@dataclass(frozen=True)
class Measure:
    """The unit of a size the user writes.

    Args:
        unit: ``pixel``: the shorter edge in px; ``area``: megapixels (10⁶ px);
            ``pixel_area``: the edge in px of the square that has the area; ``max_pixels``: px,
            and what is asked for is a limit that smaller pictures are not brought up to.
    """

    unit: str

    def of(self, sizes: Sizes) -> Numbers:
        """The measure of each size, comparable with `limit`: an edge or an area in px."""
        short = sizes.min(axis=1) if self.unit == "pixel" else sizes[:, 0] * sizes[:, 1]
        return short.astype(np.float64)

    def limit(self, value: float) -> float:
        """`value` in what `of` returns."""
        factor = {"area": MILLION, "pixel_area": value}.get(self.unit, 1)
        return value * factor

    def edge(self, value: float) -> int:
        """The edge in px of a square of this measure, not aligned."""
        if self.unit in ("pixel", "pixel_area"):
            return math.floor(value)
        return math.isqrt(round(self.limit(value)))

    def scale(self, sizes: Sizes, value: float) -> Numbers:
        """The factor on both edges that brings each size to `value`."""
        ratio = self.limit(value) / self.of(sizes)
        return ratio if self.unit == "pixel" else np.sqrt(ratio)


@dataclass(frozen=True)
class Shapes:
    """The shapes that are cut out of pictures.

    Args:
        ratios: Width over height of each, ascending.
        weights: How often each is drawn beside the others; without them the nearest is taken.
    """

    ratios: tuple[float, ...]
    weights: tuple[float, ...] = ()

    def of(self, sizes: Sizes, keys: Keys) -> Numbers:
        """The shape of each picture, [n]: the nearest by its ratio, or drawn by its key."""
        ratios = np.array(self.ratios)
        if self.weights:
            shares = np.cumsum(self.weights) / sum(self.weights)
            chosen = np.searchsorted(shares[:-1], _parts_of_one(keys), side="right")
        else:
            # Two shapes are equally near at their geometric mean.
            chosen = np.searchsorted(np.sqrt(ratios[1:] * ratios[:-1]), sizes[:, 0] / sizes[:, 1])
        shapes: Numbers = ratios[chosen]
        return shapes

    def among(self, allowed: Flags, keys: Keys) -> Numbers:
        """The shape of each picture, drawn from those of the k shapes that it may have.

        Args:
            allowed: [n, k]; where a picture may have none, it draws from all.
            keys: [n] 64 random bits of each picture.
        """
        allowed = allowed | ~allowed.any(axis=1, keepdims=True)
        # A shape that is not allowed has no share: the next one begins where it does.
        shares = np.cumsum(np.where(allowed, self.weights, 0.0), axis=1)
        drawn = _parts_of_one(keys) * shares[:, -1]
        shapes: Numbers = np.array(self.ratios)[(shares <= drawn[:, None]).sum(axis=1)]
        return shapes


def _parts_of_one(keys: Keys) -> Numbers:
    """[n] uniform in [0, 1)."""
    return (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53


SQUARE = Shapes((1.0,))


@dataclass(frozen=True)
class GeometryRule:
    """How one dataset's pictures become the sizes the encoder sees.

    Args:
        resolution: The size asked for.
        measure: Its unit, and that of the two sizes below.
        alignment: Edges are multiples of it, in px.
        rounding: Decimals the aspect ratio is rounded to before sizes are computed.
        crop: Cut out of the picture, where False only trims what alignment leaves over.
        shapes: What is cut out; None for the picture's own shape.
        style: Where the box lies: ``center``, ``corner`` (top left) or ``random``.
        maximum: Pictures above this size are brought down to `downsample` before a crop; the rest
            are not touched by it. None turns it off.
        downsample: See `maximum`; never enlarges.
        most_enlarged: Shapes that would enlarge a picture by more than this share are not drawn for
            it while there is another.
    """

    resolution: float
    measure: Measure
    alignment: int = 64
    rounding: int = 2
    crop: bool = False
    shapes: Shapes | None = None
    style: str = "center"
    maximum: float | None = None
    downsample: float | None = None
    most_enlarged: float | None = None

    def targets(self, sizes: Sizes, keys: Keys) -> Sizes:
        """The size of each picture's crop, [n, 2]: what a bucket is.

        Args:
            sizes: The oriented size of each file.
            keys: [n] 64 random bits of each picture; only shapes with weights look at them.
        """
        if self.crop and self.shapes is not None:
            return self._edges(self._chosen(self.shapes, sizes, keys), sizes)
        distinct, back = group(sizes)
        exact = self.measure.unit == "max_pixels"
        ratios = distinct[:, 0] / distinct[:, 1] if exact else self._ratios(distinct)
        return self._edges(ratios, distinct)[back]

    def _chosen(self, shapes: Shapes, sizes: Sizes, keys: Keys) -> Numbers:
        # The nearest shape enlarges least anyway.
        if self.most_enlarged is None or not shapes.weights:
            return shapes.of(sizes, keys)
        chosen = np.empty(len(sizes))
        for start in range(0, len(sizes), CHUNK):  # every shape of every picture is many numbers
            part = slice(start, start + CHUNK)
            some = sizes[part]
            scales = [
                self.cover_scale(some, self._edges(np.full(len(some), ratio), some))
                for ratio in shapes.ratios
            ]
            allowed = ~too_large(np.stack(scales, axis=1), self.most_enlarged)
            chosen[part] = shapes.among(allowed, keys[part])
        return chosen

    def _edges(self, ratios: Numbers, sizes: Sizes) -> Sizes:
        """The size that each ratio has at the resolution, in whole alignments."""
        edge = self.measure.edge(self.resolution)
        if self.measure.unit == "max_pixels":
            return self._inside(ratios, sizes)
        if self.measure.unit == "pixel":
            # The product's decimals are cut, not rounded: 0.1 px never decides an edge.
            wide = np.where(ratios >= 1, np.floor(edge * ratios), edge)
            high = np.where(ratios >= 1, edge, np.floor(edge / ratios))
        else:
            base = float(self._aligned(np.array([edge]))[0])
            wide, high = base * np.sqrt(ratios), base / np.sqrt(ratios)
        return np.stack((self._aligned(wide), self._aligned(high)), axis=1)

    def _inside(self, ratios: Numbers, sizes: Sizes) -> Sizes:
        """The largest size of each ratio within its picture and the area, cut to alignments."""
        wide = np.minimum(sizes[:, 0], sizes[:, 1] * ratios)
        shrink = np.minimum(np.sqrt(self.measure.limit(self.resolution) * ratios) / wide, 1.0)
        edges = np.stack((wide, wide / ratios), axis=1) * shrink[:, None]
        # What is a multiple up to the last bits of a float is one.
        steps = np.floor(edges / self.alignment + 1e-9).astype(np.int64)
        inside: Sizes = np.maximum(steps, 1) * self.alignment
        return inside

    def resizes(self, sizes: Sizes, targets: Sizes) -> Sizes:
        """The size of each picture after its one resize, [n, 2]: it covers its target.

        A down-scale before the crop and the one that covers the target are one resize, to the
        larger of both results.
        """
        scale = self.cover_scale(sizes, targets)
        if self.crop and self.maximum is not None and self.downsample is not None:
            down = np.minimum(self.measure.scale(sizes, self.downsample), 1.0)
            above = self.measure.of(sizes) > self.measure.limit(self.maximum)
            scale = np.where(above, np.maximum(scale, down), scale)
        scaled = np.rint(sizes * scale[:, None]).astype(np.int64)
        return np.maximum(scaled, targets)

    @staticmethod
    def cover_scale(sizes: Sizes, targets: Sizes) -> Numbers:
        """The smallest factor at which each picture covers its target; above 1 it is enlarged."""
        factors: Numbers = (targets / sizes).max(axis=1)
        return factors

    def place(
        self,
        source: tuple[int, int],
        resize: tuple[int, int],
        target: tuple[int, int],
        key: int,
    ) -> Geometry:
        """The geometry of one picture.

        Args:
            source: The oriented size of the file.
            resize: Its size after the resize.
            target: The size of the crop.
            key: 64 random bits; only the style ``random`` looks at them.
        """
        slack = np.array([resize], np.int64) - np.array(target, np.int64)
        ((left, top),) = self.offsets(slack, np.array([key], np.uint64)).tolist()
        return Geometry(source=source, resize=resize, crop=(left, top, *target))

    def offsets(self, slack: Sizes, keys: Keys) -> Sizes:
        """[n, 2] how far the crops lie from the left and from the top.

        Args:
            slack: [n, 2] by how much a resized picture is larger than its crop.
            keys: [n] 64 random bits; only the style ``random`` looks at them.
        """
        if self.style == "random":
            parts = np.stack((keys >> np.uint64(32), keys & np.uint64(0xFFFFFFFF)), axis=1)
            room = (slack + 1).astype(np.uint64)
            return (parts * room >> np.uint64(32)).astype(np.int64)
        return slack // 2 if self.style == "center" else np.zeros_like(slack)

    def _ratios(self, sizes: Sizes) -> Numbers:
        # Python's round: numpy's multiplies first and can fall on the other side of a tie.
        least = 10.0**-self.rounding
        exact = (sizes[:, 0] / sizes[:, 1]).tolist()
        return np.array([max(round(ratio, self.rounding), least) for ratio in exact])

    def _aligned(self, edges: NDArray[np.generic]) -> Sizes:
        """The nearest multiple, halves to the even one, at least one multiple."""
        steps = np.rint(edges.astype(np.float64) / self.alignment)
        aligned: Sizes = (np.maximum(steps, 1) * self.alignment).astype(np.int64)
        return aligned


@dataclass(frozen=True)
class SizeFilter:
    """Which pictures the user does not want, by their size.

    Args:
        minimum: Smaller pictures are left out; in `measure`.
        square: With an area, both edges must also reach the edge of a square of `minimum`.
        least_ratio: Width over height must be at least this.
        most_ratio: Width over height must be at most this.
        most_enlarged: The share by which a picture may have to be enlarged.
    """

    measure: Measure
    minimum: float | None = None
    square: bool = False
    least_ratio: float | None = None
    most_ratio: float | None = None
    most_enlarged: float | None = None

    def left_out(self, sizes: Sizes, scales: Numbers) -> dict[str, Flags]:
        """For each filter that is on: its name and who is left out by it, [n].

        Args:
            sizes: The oriented size of each file.
            scales: The factor at which each covers its bucket.
        """
        found: dict[str, Flags] = {}
        ratio = sizes[:, 0] / sizes[:, 1]
        if self.minimum:
            small = self.measure.of(sizes) < self.measure.limit(self.minimum)
            if self.square and self.measure.unit != "pixel":
                small |= sizes.min(axis=1) < self.measure.edge(self.minimum)
            found["minimum_image_size"] = small
        if self.least_ratio is not None:
            found["minimum_aspect_ratio"] = ratio < self.least_ratio
        if self.most_ratio is not None:
            found["maximum_aspect_ratio"] = ratio > self.most_ratio
        if self.most_enlarged is not None:
            found["max_upscale_threshold"] = too_large(scales, self.most_enlarged)
        return found


def too_large(scales: Numbers, most_enlarged: float) -> Flags:
    """Which factors enlarge by more than a share; rounding alone is never more."""
    found: Flags = scales > 1 + most_enlarged + 1e-9
    return found
