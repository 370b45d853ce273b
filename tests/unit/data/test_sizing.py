"""What the size settings make of a dataset: shapes, limits, rare buckets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simpletuner.core.errors import DataError
from simpletuner.core.events import Bus
from simpletuner.data.excluded import Excluded
from simpletuner.data.plan import BatchPlan
from simpletuner.data.source import DataSource
from tests.unit.data.making import SEEDS, entry, opened, picture


def shapes_by_content(source: DataSource) -> dict[str, tuple[int, ...]]:
    rows = range(len(source))
    return {bytes(source.content[row]).hex(): tuple(source.buckets[row].tolist()) for row in rows}


def test_a_random_shape_belongs_to_the_content_of_a_picture(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(12):
        picture(data, f"{number}.png", (64 + number, 64))
    crop = {"crop": True, "crop_aspect": "random", "crop_aspect_buckets": [0.5, 1, 2]}
    before = shapes_by_content(opened(data, **crop))
    assert set(before.values()) == {(48, 88), (64, 64), (88, 48)}
    for number in range(12):
        (data / f"{number}.png").rename(data / f"{99 - number}.png")
    (data / "99.png").rename(data / "new.png")
    picture(data, "another.png", (64, 70))
    after = shapes_by_content(opened(data, **crop))
    assert before.items() <= after.items()
    # The weights are shares: ten times all of them draws the same.
    tenfold = [{"aspect": ratio, "weight": 10} for ratio in (2, 1, 0.5)]
    assert shapes_by_content(opened(data, **crop | {"crop_aspect_buckets": tenfold})) == after
    wide = [{"aspect": 2, "weight": 1e9}, 0.5]
    assert set(
        shapes_by_content(opened(data, **crop | {"crop_aspect_buckets": wide})).values()
    ) == {(88, 48)}


def test_closest_crops_to_the_nearest_of_the_shapes(folder: Path) -> None:
    crop = {"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": [0.5, 1]}
    source = opened(folder, **crop)
    assert source.buckets.tolist() == [[64, 64], [64, 64], [48, 88]]
    assert source.pixels(2).shape == (88, 48, 3)


def test_pictures_that_would_be_enlarged_too_much_are_left_out_and_counted(folder: Path) -> None:
    source = opened(folder, resolution=80, max_upscale_threshold=0.2)
    assert source.buckets.tolist() == [[96, 64], [64, 96]]
    assert source.excluded() == (Excluded("max_upscale_threshold", 1, "deep/er/ox.png"),)
    assert len(opened(folder, resolution=80, max_upscale_threshold=0.25)) == 3


def test_a_picture_keeps_its_size_under_max_pixels(folder: Path) -> None:
    source = opened(folder, resolution_type="max_pixels", resolution=64 * 64)
    assert source.buckets.tolist() == [[72, 48], [64, 64], [48, 72]]
    assert source.enlarged == 0


def rare_shapes(folder: Path, most: tuple[int, int], few: tuple[int, int]) -> Path:
    """Four pictures of one size and one of another."""
    for number in range(4):
        picture(folder, f"{number}.png", most)
    picture(folder, "odd.png", few)
    return folder


def sized(folder: Path, batch: int, **rest: Any) -> DataSource:
    return DataSource.open(
        entry(folder, **rest), index_folder=folder.parent / "c", train_batch_size=batch, bus=Bus()
    )


def test_one_rare_shape_never_stops_a_run(tmp_path: Path) -> None:
    data = rare_shapes(tmp_path / "data", (64, 64), (200, 50))
    for policy in ("keep", "merge", "drop"):
        source = sized(data, 4, rare_buckets=policy)
        plan = BatchPlan.of(
            [source], train_batch_size=4, gradient_accumulation_steps=1, seeds=SEEDS
        )
        assert plan.samples_per_epoch == (4 if policy == "drop" else 5)
    assert source.left_out["rare_buckets"].count == 1
    assert source.left_out["rare_buckets"].example == "odd.png"


def test_a_bucket_is_rare_by_the_batch_and_the_repeats(tmp_path: Path) -> None:
    data = rare_shapes(tmp_path / "data", (64, 64), (200, 50))
    assert len(sized(data, 1, rare_buckets="drop")) == 5
    assert len(sized(data, 2, rare_buckets="drop")) == 4
    assert len(sized(data, 2, rare_buckets="drop", repeats=1)) == 5
    assert len(sized(data, 1, rare_buckets="drop", train_batch_size=2)) == 4
    with pytest.raises(DataError, match="5 left out by rare_buckets"):
        sized(data, 5, rare_buckets="drop")


def test_a_rare_picture_is_cropped_to_the_nearest_full_size(tmp_path: Path) -> None:
    data = rare_shapes(tmp_path / "data", (640, 640), (640, 600))
    size = {"resolution": 512, "crop_style": "center"}
    kept, merged = (sized(data, 4, rare_buckets=p, **size) for p in ("keep", "merge"))
    assert kept.buckets.tolist() == [[512, 512]] * 4 + [[528, 496]]
    assert merged.buckets.tolist() == [[512, 512]] * 5
    assert (kept.merged, merged.merged) == (0, 1)
    assert merged.geometry(4).resize == (546, 512)
    assert merged.pixels(4).shape == (512, 512, 3)
    assert merged.identity()["resizes"] != kept.identity()["resizes"]


def test_max_num_samples_and_rare_buckets_follow_each_other(tmp_path: Path) -> None:
    data = rare_shapes(tmp_path / "data", (64, 64), (200, 50))
    few = sized(data, 2, rare_buckets="drop", max_num_samples=3)
    assert few.left_out["max_num_samples"].count == 2
    assert {tuple(size) for size in few.buckets.tolist()} == {(64, 64)}


def subset(folder: Path, **rest: Any) -> list[bytes]:
    source = opened(folder, **rest)
    return [bytes(source.content[row]) for row in range(len(source))]


def test_max_num_samples_always_takes_the_same_pictures(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(12):
        picture(data, f"{number}.png", (64 + 8 * (number % 3), 64))
    chosen = subset(data, max_num_samples=5)
    assert len(chosen) == len(set(chosen)) == 5
    assert set(subset(data, max_num_samples=7)) > set(chosen)
    assert sorted(subset(data, max_num_samples=5, id="dogs", resolution=128)) == sorted(chosen)
    assert len(subset(data, max_num_samples=99)) == 12
    for number in range(12):
        (data / f"{number}.png").rename(data / f"{chr(110 - number)}.png")
    assert sorted(subset(data, max_num_samples=5)) == sorted(chosen)


def test_a_new_picture_takes_the_place_of_one_at_most_under_max_num_samples(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    for number in range(8):
        picture(data, f"{number}.png")
    before = set(subset(data, max_num_samples=4))
    changed = 0
    for number in range(8, 14):
        picture(data, f"{number}.png")
        after = set(subset(data, max_num_samples=4))
        assert len(after) == 4
        assert len(before - after) <= 1
        changed += len(before - after)
        before = after
    assert changed


def test_max_num_samples_counts_what_the_filters_leave(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(6):
        picture(data, f"{number}.png", (96, 64) if number % 2 else (16, 16))
    source = opened(data, max_num_samples=2, minimum_image_size=32)
    assert len(source) == 2
    assert [(out.reason, out.count) for out in source.excluded()] == [
        ("minimum_image_size", 3),
        ("max_num_samples", 1),
    ]
