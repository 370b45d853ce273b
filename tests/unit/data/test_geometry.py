from __future__ import annotations

import math
import random

import numpy as np
import pytest

from simpletuner.core.types import Geometry
from simpletuner.data.geometry import SQUARE, GeometryRule, Measure, Shapes, SizeFilter

ALIGNMENTS = (8, 16, 24, 32, 64)
ASKED = {"pixel_area": 1024, "area": 1.048576, "pixel": 1024}
KEYS = np.zeros(1, np.uint64)
MAX_PIXELS = 1024 * 1024


def rule(unit: str = "pixel_area", resolution: float = 1024, **rest: object) -> GeometryRule:
    return GeometryRule(resolution, Measure(unit), **rest)  # type: ignore[arg-type]


def target(size: tuple[int, int], rule: GeometryRule) -> tuple[int, int]:
    width, height = rule.targets(np.array([size]), KEYS)[0]
    return int(width), int(height)


def placed(size: tuple[int, int], rule: GeometryRule, key: int = 0) -> Geometry:
    sizes = np.array([size])
    targets = rule.targets(sizes, KEYS)
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
    assert target((900, 900), rule("area", 0.5, alignment=8, crop=True, shapes=SQUARE)) == (
        704,
        704,
    )


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
@pytest.mark.parametrize("shapes", [None, SQUARE])
@pytest.mark.parametrize("unit", ASKED)
def test_the_crop_lies_inside_and_the_scale_is_uniform(
    unit: str, shapes: Shapes | None, crop: bool, style: str
) -> None:
    generator = random.Random(1)
    for alignment in ALIGNMENTS:
        made = rule(unit, ASKED[unit], alignment=alignment, crop=crop, shapes=shapes, style=style)
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
    assert len(np.unique(rule(alignment=8, rounding=1).targets(sizes, KEYS), axis=0)) == 1
    assert len(np.unique(rule(alignment=8, rounding=2).targets(sizes, KEYS), axis=0)) == 2


def test_a_thread_of_a_picture_still_has_a_size() -> None:
    # 0.0003 is 0.00 with two decimals; the least ratio is one step of them.
    assert target((2, 6000), rule()) == (128, 10240)


def test_center_and_corner_lie_where_they_say() -> None:
    size = (3000, 2000)
    square = {"crop": True, "shapes": SQUARE}
    assert placed(size, rule(**square, style="center")).crop == (256, 0, 1024, 1024)
    assert placed(size, rule(**square, style="corner")).crop == (0, 0, 1024, 1024)
    assert placed(size, rule(**square)).resize == (1536, 1024)


def test_random_crops_reach_every_offset_and_only_them() -> None:
    made = rule(resolution=64, crop=True, shapes=SQUARE, style="random")
    generator = random.Random(0)
    lefts = {placed((68, 64), made, generator.getrandbits(64)).crop[0] for _ in range(200)}
    assert lefts == {0, 1, 2, 3, 4}


def test_without_a_crop_only_the_trim_is_lost() -> None:
    geometry = placed((3000, 2000), rule(maximum=1024, downsample=2048))
    assert geometry.resize == (1280, 853)
    assert geometry.crop == (0, 10, 1280, 832)


def test_maximum_image_size_is_a_threshold_and_never_enlarges() -> None:
    made = rule(crop=True, shapes=SQUARE, maximum=2048, downsample=1536)
    at = placed((2048, 2048), made)
    above = placed((2049, 2048), made)
    assert at.resize == (1024, 1024)
    assert above.resize == (1536, 1536)
    assert above.crop == (256, 256, 1024, 1024)
    huge = rule(crop=True, shapes=SQUARE, maximum=1100, downsample=9000)
    assert placed((1200, 1200), huge).resize == (1200, 1200)


def test_downsample_and_cover_are_one_resize() -> None:
    made = rule(crop=True, shapes=SQUARE, maximum=1024, downsample=1024)
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
    made = rule(unit, ASKED[unit], crop=True, shapes=SQUARE, maximum=maximum, downsample=downsample)
    below, above = placed((2000, 2000), made), placed((2010, 2010), made)
    assert below.resize == (1024, 1024)
    edge = 1500 if unit == "pixel" else round(math.sqrt(2e6))
    assert above.resize == (edge, edge)


def left_out(sizes: list[tuple[int, int]], wanted: SizeFilter) -> dict[str, list[bool]]:
    return {
        name: out.tolist()
        for name, out in wanted.left_out(np.array(sizes), np.ones(len(sizes))).items()
    }


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


def test_a_picture_that_has_to_be_enlarged_too_much_is_left_out() -> None:
    sizes, made = np.array([(1024, 1024), (820, 820), (819, 819), (512, 512)]), rule(shapes=SQUARE)
    scales = made.cover_scale(sizes, made.targets(sizes, np.zeros(4, np.uint64)))
    most = SizeFilter(Measure("pixel_area"), most_enlarged=0.25)
    assert most.left_out(sizes, scales)["max_upscale_threshold"].tolist() == [0, 0, 1, 1]
    none = SizeFilter(Measure("pixel_area"), most_enlarged=0.0)
    assert none.left_out(sizes, scales)["max_upscale_threshold"].tolist() == [0, 1, 1, 1]


# --- max_pixels: a limit, not a size -------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((1024, 768), (1024, 768)),
        ((1000, 700), (992, 688)),
        ((2048, 2048), (1024, 1024)),
        ((3000, 2000), (1248, 832)),
        ((3072, 1024), (1760, 576)),
        ((20, 2000), (16, 2000)),
        ((10, 100), (16, 96)),
    ],
)
def test_max_pixels_brings_large_pictures_down_and_leaves_small_ones(
    size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    assert target(size, rule("max_pixels", MAX_PIXELS, alignment=16)) == wanted


def test_a_crop_under_max_pixels_is_the_largest_that_fits() -> None:
    square = rule("max_pixels", MAX_PIXELS, alignment=16, crop=True, shapes=SQUARE)
    assert target((700, 500), square) == (496, 496)
    assert target((4000, 3000), square) == (1024, 1024)
    assert placed((4000, 3000), square).resize == (1365, 1024)
    wide = rule("max_pixels", MAX_PIXELS, alignment=16, crop=True, shapes=Shapes((2.0,)))
    assert target((800, 800), wide) == (800, 400)


# --- shapes to choose from -----------------------------------------------------------------------


def test_closest_takes_the_nearest_shape_by_its_ratio() -> None:
    made = rule(crop=True, shapes=Shapes((0.5, 1.0, 2.0)), alignment=8)
    square, wide, tall = (1024, 1024), (1448, 728), (728, 1448)
    # sqrt(2) lies in the middle between 1 and 2, in either direction.
    assert target((1414, 1000), made) == square
    assert target((1415, 1000), made) == wide
    assert target((1000, 1414), made) == square
    assert target((1000, 1415), made) == tall
    assert target((9000, 1000), made) == wide


def test_random_shapes_are_drawn_in_proportion_to_their_weights() -> None:
    made = rule(crop=True, shapes=Shapes((0.5, 1.0, 2.0), (1, 2, 5)))
    generator = random.Random(3)
    keys = np.array([generator.getrandbits(64) for _ in range(4000)], np.uint64)
    drawn = made.targets(np.full((4000, 2), 1000), keys)
    tall, square, wide = ((drawn[:, 0] / drawn[:, 1]).round() == r for r in (0, 1, 2))
    for found, share in ((tall, 1 / 8), (square, 2 / 8), (wide, 5 / 8)):
        assert abs(found.mean() - share) < 0.03
    ends = made.targets(np.full((2, 2), 1000), np.array([0, 2**64 - 1], np.uint64))
    assert ends.tolist() == [[704, 1472], [1472, 704]]


CUTS = {
    "nothing": {"crop": False},
    "square": {"crop": True, "shapes": SQUARE},
    "preserve": {"crop": True},
    "closest": {"crop": True, "shapes": Shapes((0.5, 0.75, 1.0, 1.5, 1.78))},
    "random": {"crop": True, "shapes": Shapes((0.5, 1.0, 1.78), (1, 1, 3))},
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("unit", [*ASKED, "max_pixels"])
def test_every_picture_is_scaled_evenly_and_cropped_inside_to_about_the_area_asked(
    unit: str, cut: str
) -> None:
    generator = random.Random(f"{unit} {cut}")
    sizes = np.array([[generator.randint(500, 3000) for _ in range(2)] for _ in range(200)])
    keys = np.array([generator.getrandbits(64) for _ in sizes], np.uint64)
    for alignment in (8, 16, 24, 32, 40, 48, 56, 64):
        made = rule(unit, ASKED.get(unit, MAX_PIXELS), alignment=alignment, **CUTS[cut])
        targets = made.targets(sizes, keys)
        resizes = made.resizes(sizes, targets)
        assert (targets % alignment == 0).all()
        assert (targets > 0).all()
        scales = resizes / sizes
        assert (np.abs(scales[:, 0] / scales[:, 1] - 1) < 0.01).all()
        assert (resizes >= targets).all()
        # Nothing but the cut is lost: the resize touches its crop on one side.
        assert (resizes == targets).any(axis=1).all()
        area = targets.prod(axis=1) / MAX_PIXELS
        if unit == "max_pixels":
            assert (area <= 1).all()
            assert (targets <= sizes).all()
        elif unit != "pixel":
            # Each edge is rounded by half an alignment at most.
            assert (np.abs(area - 1) < 0.07 + alignment / targets.min(axis=1)).all()


# --- max_upscale_threshold: shapes above it are not chosen ---------------------------------------


def test_shapes_that_enlarge_too_much_are_not_drawn_while_another_is_left() -> None:
    shapes = Shapes((0.5, 1.0, 2.0), (1, 1, 2))
    made = rule(crop=True, shapes=shapes, most_enlarged=0.0, alignment=8)
    count = 4000
    keys = np.random.default_rng(0).integers(0, 2**64, count, dtype=np.uint64)
    wide = made.targets(np.array([(1600, 1030)] * count), keys)  # 728x1448 would enlarge it
    shares = {(w, h): int((wide == (w, h)).all(axis=1).sum()) for w, h in np.unique(wide, axis=0)}
    assert shares.keys() == {(1024, 1024), (1448, 728)}
    assert shares[1448, 728] / count == pytest.approx(2 / 3, abs=0.03)  # 2 to 1, as they were given

    small = np.array([(300, 300)] * count)  # each would: the draw is as ever, the filter says so
    free = rule(crop=True, shapes=shapes, alignment=8)
    assert (made.targets(small, keys) == free.targets(small, keys)).all()
