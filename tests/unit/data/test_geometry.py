from __future__ import annotations

import math
import random

import numpy as np
import pytest

from simpletuner.core.types import Geometry
from simpletuner.data.geometry import GeometryRule, Measure, SizeFilter

ALIGNMENTS = (8, 16, 24, 32, 64)
ASKED = {"pixel_area": 1024, "area": 1.048576, "pixel": 1024}


def rule(unit: str = "pixel_area", resolution: float = 1024, **rest: object) -> GeometryRule:
    return GeometryRule(resolution, Measure(unit), **rest)  # type: ignore[arg-type]


def target(size: tuple[int, int], rule: GeometryRule) -> tuple[int, int]:
    width, height = rule.targets(np.array([size]))[0]
    return int(width), int(height)


def placed(size: tuple[int, int], rule: GeometryRule, key: int = 0) -> Geometry:
    sizes = np.array([size])
    targets = rule.targets(sizes)
    resizes = rule.resizes(sizes, targets)
    return rule.place(size, tuple(resizes[0].tolist()), tuple(targets[0].tolist()), key)


@pytest.mark.parametrize(
    ("size", "asked", "wanted"),
    [
        ((2000, 2000), 1024, (1024, 1024)),
        ((3000, 2000), 1024, (1280, 832)),
        ((2000, 3000), 1024, (832, 1280)),
        ((2000, 2000), 512, (512, 512)),
        ((3000, 2000), 512, (640, 448)),
        ((2000, 2000), 480, (512, 512)),
        ((2000, 2000), 720, (704, 704)),
    ],
)
def test_pixel_area_gives_the_documented_sizes(
    size: tuple[int, int], asked: int, wanted: tuple[int, int]
) -> None:
    assert target(size, rule(resolution=asked)) == wanted


@pytest.mark.parametrize(
    ("size", "wanted"), [((3000, 2000), (1536, 1024)), ((2000, 3000), (1024, 1536))]
)
def test_pixel_is_the_shorter_edge(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    # 2:3 is 0.67 with two decimals: 1024 / 0.67 = 1528.3, and the nearest multiple of 64 is 1536.
    assert target(size, rule("pixel")) == wanted


def test_area_is_megapixels_and_has_no_table_of_favourite_sizes() -> None:
    assert target((900, 900), rule("area", 1.0, alignment=8)) == (1000, 1000)
    assert target((900, 900), rule("area", 0.5, alignment=8)) == (704, 704)
    assert target((900, 900), rule("area", 1.048576)) == (1024, 1024)
    assert target((900, 900), rule("area", 0.5, alignment=8, crop=True, square=True)) == (704, 704)


@pytest.mark.parametrize("unit", ASKED)
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_sizes_follow_the_rule_in_plain_python(unit: str, alignment: int) -> None:
    def multiple(value: float) -> int:
        return max(1, round(value / alignment)) * alignment

    generator = random.Random(alignment)
    made = rule(unit, ASKED[unit], alignment=alignment)
    for _ in range(100):
        size = (generator.randint(200, 6000), generator.randint(200, 6000))
        ratio = max(round(size[0] / size[1], 2), 0.01)
        if unit == "pixel":
            wide = math.floor(1024 * ratio) if ratio >= 1 else 1024
            high = 1024 if ratio >= 1 else math.floor(1024 / ratio)
        else:
            edge = multiple(1024)
            wide, high = edge * math.sqrt(ratio), edge / math.sqrt(ratio)
        assert target(size, made) == (multiple(wide), multiple(high))


@pytest.mark.parametrize("style", ["center", "corner", "random"])
@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("unit", ASKED)
def test_the_crop_lies_inside_and_the_scale_is_uniform(
    unit: str, square: bool, crop: bool, style: str
) -> None:
    generator = random.Random(1)
    for alignment in ALIGNMENTS:
        made = rule(unit, ASKED[unit], alignment=alignment, crop=crop, square=square, style=style)
        for _ in range(40):
            height = generator.randint(150, 4000)
            size = (int(height * generator.uniform(0.4, 2.5)), height)
            geometry = placed(size, made, generator.getrandbits(64))
            left, top, wide, high = geometry.crop
            assert wide % alignment == 0
            assert high % alignment == 0
            assert left >= 0
            assert top >= 0
            assert left + wide <= geometry.resize[0]
            assert top + high <= geometry.resize[1]
            scales = (geometry.resize[0] / size[0], geometry.resize[1] / size[1])
            assert abs(scales[0] / scales[1] - 1) < 0.01
            # Nothing but the trim is lost: the resize touches its target on one side.
            assert geometry.resize[0] == wide or geometry.resize[1] == high
            if unit != "pixel":
                asked = 1024 * 1024
                # Each edge is rounded by half an alignment at most.
                bound = 0.07 + alignment / min(wide, high)
                assert abs(wide * high / asked - 1) < bound


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_the_area_is_within_seven_percent_of_what_was_asked(alignment: int) -> None:
    generator = random.Random(alignment)
    made = rule(alignment=alignment)
    for _ in range(200):
        size = (generator.randint(1000, 3000), generator.randint(1000, 3000))
        wide, high = target(size, made)
        assert abs(wide * high / 1024**2 - 1) < 0.07


def test_rounding_decides_which_ratios_share_a_size() -> None:
    sizes = np.array([(1000, 1000), (1040, 1000)])
    assert len(np.unique(rule(alignment=8, rounding=1).targets(sizes), axis=0)) == 1
    assert len(np.unique(rule(alignment=8, rounding=2).targets(sizes), axis=0)) == 2


def test_a_thread_of_a_picture_still_has_a_size() -> None:
    # 0.0003 is 0.00 with two decimals; the least ratio is one step of them.
    assert target((2, 6000), rule()) == (128, 10240)


def test_center_and_corner_lie_where_they_say() -> None:
    size = (3000, 2000)
    square = {"crop": True, "square": True}
    assert placed(size, rule(**square, style="center")).crop == (256, 0, 1024, 1024)
    assert placed(size, rule(**square, style="corner")).crop == (0, 0, 1024, 1024)
    assert placed(size, rule(**square)).resize == (1536, 1024)


def test_random_crops_reach_every_offset_and_only_them() -> None:
    made = rule(resolution=64, crop=True, square=True, style="random")
    generator = random.Random(0)
    lefts = {placed((68, 64), made, generator.getrandbits(64)).crop[0] for _ in range(200)}
    assert lefts == {0, 1, 2, 3, 4}


def test_without_a_crop_only_the_trim_is_lost() -> None:
    geometry = placed((3000, 2000), rule(maximum=1024, downsample=2048))
    assert geometry.resize == (1280, 853)
    assert geometry.crop == (0, 10, 1280, 832)


def test_maximum_image_size_is_a_threshold_and_never_enlarges() -> None:
    made = rule(crop=True, square=True, maximum=2048, downsample=1536)
    at = placed((2048, 2048), made)
    above = placed((2049, 2048), made)
    assert at.resize == (1024, 1024)
    assert above.resize == (1536, 1536)
    assert above.crop == (256, 256, 1024, 1024)
    huge = rule(crop=True, square=True, maximum=1100, downsample=9000)
    assert placed((1200, 1200), huge).resize == (1200, 1200)


def test_downsample_and_cover_are_one_resize() -> None:
    made = rule(crop=True, square=True, maximum=1024, downsample=1024)
    assert placed((3000, 2000), made).resize == (1536, 1024)
    preserve = rule(crop=True, maximum=1024, downsample=2048)
    geometry = placed((6000, 4000), preserve)
    assert geometry.target == (1280, 832)
    assert geometry.resize == (2508, 1672)


@pytest.mark.parametrize(
    ("unit", "maximum", "downsample"), [("area", 4.0, 2.0), ("pixel", 2000, 1500)]
)
def test_the_two_sizes_have_the_unit_of_resolution_type(
    unit: str, maximum: float, downsample: float
) -> None:
    made = rule(unit, ASKED[unit], crop=True, square=True, maximum=maximum, downsample=downsample)
    below, above = placed((2000, 2000), made), placed((2010, 2010), made)
    assert below.resize == (1024, 1024)
    edge = 1500 if unit == "pixel" else round(math.sqrt(2e6))
    assert above.resize == (edge, edge)


def left_out(sizes: list[tuple[int, int]], wanted: SizeFilter) -> dict[str, list[bool]]:
    return {name: out.tolist() for name, out in wanted.left_out(np.array(sizes)).items()}


def test_minimum_image_size_by_unit() -> None:
    sizes = [(512, 512), (511, 2000), (400, 700), (300, 300)]
    pixel = SizeFilter(Measure("pixel"), minimum=512)
    assert left_out(sizes, pixel) == {"minimum_image_size": [False, True, True, True]}
    area = SizeFilter(Measure("area"), minimum=0.262144)
    assert left_out(sizes, area) == {"minimum_image_size": [False, False, False, True]}
    for measure, minimum in ((Measure("area"), 0.262144), (Measure("pixel_area"), 512)):
        square = SizeFilter(measure, minimum=minimum, square=True)
        assert left_out(sizes, square) == {"minimum_image_size": [False, True, True, True]}


def test_aspect_limits_are_inclusive_and_off_by_default() -> None:
    sizes = [(1000, 1000), (2000, 1000), (2001, 1000), (499, 1000)]
    assert left_out(sizes, SizeFilter(Measure("area"))) == {}
    both = SizeFilter(Measure("area"), least_ratio=0.5, most_ratio=2.0)
    assert left_out(sizes, both) == {
        "minimum_aspect_ratio": [False, False, False, True],
        "maximum_aspect_ratio": [False, False, True, False],
    }
