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
Flags = NDArray[np.bool_]

MILLION = 1_000_000


@dataclass(frozen=True)
class Measure:
    """The unit of a size the user writes.

    Args:
        unit: ``pixel``: the shorter edge in px; ``area``: megapixels (10⁶ px);
            ``pixel_area``: the edge in px of the square that has the area.
    """

    unit: str

    def of(self, sizes: Sizes) -> NDArray[np.float64]:
        """The measure of each size, comparable with `limit`: an edge or an area in px."""
        short = sizes.min(axis=1) if self.unit == "pixel" else sizes[:, 0] * sizes[:, 1]
        return short.astype(np.float64)

    def limit(self, value: float) -> float:
        """`value` in what `of` returns."""
        if self.unit == "pixel":
            return value
        return value * MILLION if self.unit == "area" else value * value

    def edge(self, value: float) -> int:
        """The edge in px of a square of this measure, not aligned."""
        return math.isqrt(round(value * MILLION)) if self.unit == "area" else math.floor(value)

    def scale(self, sizes: Sizes, value: float) -> NDArray[np.float64]:
        """The factor on both edges that brings each size to `value`."""
        ratio = self.limit(value) / self.of(sizes)
        return ratio if self.unit == "pixel" else np.sqrt(ratio)


@dataclass(frozen=True)
class GeometryRule:
    """How one dataset's pictures become the sizes the encoder sees.

    Args:
        resolution: The size asked for.
        measure: Its unit, and that of the two sizes below.
        alignment: Edges are multiples of it, in px.
        rounding: Decimals the aspect ratio is rounded to before sizes are computed.
        crop: Cut out of the picture, where False only trims what alignment leaves over.
        square: The cut is a square instead of the picture's own shape.
        style: Where the box lies: ``center``, ``corner`` (top left) or ``random``.
        maximum: Pictures above this size are brought down to `downsample` before a crop; the rest
            are not touched by it. None turns it off.
        downsample: See `maximum`; never enlarges.
    """

    resolution: float
    measure: Measure
    alignment: int = 64
    rounding: int = 2
    crop: bool = False
    square: bool = False
    style: str = "center"
    maximum: float | None = None
    downsample: float | None = None

    def targets(self, sizes: Sizes) -> Sizes:
        """The size of each picture's crop, [n, 2]: what a bucket is."""
        if self.crop and self.square:
            edge = self._aligned(np.array([self.measure.edge(self.resolution)]))[0]
            return np.full_like(sizes, edge)
        distinct, back = group(sizes)
        ratios = self._ratios(distinct)
        edge = self.measure.edge(self.resolution)
        if self.measure.unit == "pixel":
            # The product's decimals are cut, not rounded: 0.1 px never decides an edge.
            wide = np.where(ratios >= 1, np.floor(edge * ratios), edge)
            high = np.where(ratios >= 1, edge, np.floor(edge / ratios))
        else:
            base = float(self._aligned(np.array([edge]))[0])
            wide, high = base * np.sqrt(ratios), base / np.sqrt(ratios)
        made = np.stack((self._aligned(wide), self._aligned(high)), axis=1)
        return made[back]

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
    def cover_scale(sizes: Sizes, targets: Sizes) -> NDArray[np.float64]:
        """The smallest factor at which each picture covers its target; above 1 it is enlarged."""
        factors: NDArray[np.float64] = (targets / sizes).max(axis=1)
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
        slack = (resize[0] - target[0], resize[1] - target[1])
        if self.style == "random":
            x, y = (key >> 32, key & 0xFFFFFFFF)
            offset = ((x * (slack[0] + 1)) >> 32, (y * (slack[1] + 1)) >> 32)
        elif self.style == "center":
            offset = (slack[0] // 2, slack[1] // 2)
        else:
            offset = (0, 0)
        return Geometry(source=source, resize=resize, crop=(*offset, *target))

    def _ratios(self, sizes: Sizes) -> NDArray[np.float64]:
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
    """Which pictures the user does not want, by their own size.

    Args:
        minimum: Smaller pictures are left out; in `measure`.
        square: With an area, both edges must also reach the edge of a square of `minimum`.
        least_ratio: Width over height must be at least this.
        most_ratio: Width over height must be at most this.
    """

    measure: Measure
    minimum: float | None = None
    square: bool = False
    least_ratio: float | None = None
    most_ratio: float | None = None

    def left_out(self, sizes: Sizes) -> dict[str, Flags]:
        """For each filter that is on: its name and who is left out by it, [n]."""
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
        return found
