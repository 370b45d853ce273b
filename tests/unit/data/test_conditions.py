"""Control pictures and references: found by path, cut as their pictures are, named where absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simpletuner.core.errors import DataError
from simpletuner.core.events import Bus
from simpletuner.data.preview import look, page, sheet
from simpletuner.data.settings import DatasetSettings
from simpletuner.data.source import DataSource
from tests.unit.data.making import SEEDS, entry, opened


def beside(folder: Path, scale: float = 1, name: str = "edges") -> Path:
    """For each picture the same with red and blue changed, of another size."""
    made = folder.parent / name
    for path in folder.rglob("*.png"):
        image = Image.open(path).convert("RGB")
        size = (round(image.width * scale), round(image.height * scale))
        blue = Image.merge("RGB", image.split()[::-1]).resize(size, Image.Resampling.BOX)
        target = made / path.relative_to(folder).with_suffix(".webp")
        target.parent.mkdir(parents=True, exist_ok=True)
        blue.save(target, lossless=True)
    return made


def conditioned(folder: Path, *sets: tuple[str, str], **rest: Any) -> DataSource:
    """The dataset of `folder` with sets of a folder and a conditioning_type each."""
    return DataSource.open(
        entry(folder, **rest),
        index_folder=folder.parent / "cache",
        paired=[
            DatasetSettings(id=name, conditioning_type=kind, instance_data_dir=folder.parent / name)
            for name, kind in sets
        ],
        bus=Bus(),
    )


@pytest.mark.parametrize("kind", ["controlnet", "reference_strict"])
@pytest.mark.parametrize("style", ["center", "random", "corner"])
@pytest.mark.parametrize("scale", [1, 2])
def test_it_is_cut_as_its_picture_is(folder: Path, kind: str, style: str, scale: int) -> None:
    beside(folder, scale)
    source = conditioned(folder, ("edges", kind), crop=True, crop_style=style)
    assert source.conditions == (("edges", kind),)
    for row in range(len(source)):
        sample = source.sample(row, 0, 0, SEEDS)
        control = source.condition("edges", row, sample.geometry)
        pixels = source.pixels(sample)
        assert control.shape == pixels.shape
        off = np.abs(control[:, :, ::-1].astype(int) - pixels)
        assert off.mean() < (1 if scale == 1 else 20)  # noise loses its edges, one px off is 60


def test_a_loose_reference_keeps_its_own_shape(folder: Path) -> None:
    made = beside(folder)
    path = next(made.rglob("*.webp"))
    Image.new("RGB", (200, 90), "red").save(path, lossless=True)
    source = conditioned(
        folder, ("edges", "reference_loose"), crop=False, resolution=64, resolution_type="pixel"
    )
    shapes = {
        source.path(row): source.condition("edges", row, source.geometry(row)).shape
        for row in range(len(source))
    }
    height, width, _ = shapes[path.relative_to(made).with_suffix(".png").as_posix()]
    assert 1.9 < width / height < 2.6  # 200 to 90, on the grid
    assert all(width >= 64 and height >= 64 for height, width, _ in shapes.values())


def test_a_strict_one_of_another_shape_is_named(folder: Path) -> None:
    path = next(beside(folder).rglob("*.webp"))
    Image.new("RGB", (200, 90)).save(path)
    with pytest.raises(DataError, match=r"its control picture .* is 200x90, the picture"):
        conditioned(folder, ("edges", "controlnet"))


def test_what_has_no_pair_is_listed_before_anything_is_trained(folder: Path) -> None:
    made = beside(folder)
    path = next(made.rglob("*.webp"))
    path.rename(made / "stranger.webp")
    lost = path.relative_to(made).with_suffix(".png").as_posix()
    with pytest.raises(DataError) as error:
        conditioned(folder, ("edges", "controlnet"))
    assert f"{lost}: no control picture in edges" in error.value.message
    assert "1 control picture in edges is left over:\n  stranger.webp" in error.value.message
    assert "a whole control picture of its path and shape" in str(error.value)

    rest = conditioned(folder, ("edges", "controlnet"), allow_excluded=True)
    assert len(rest) == len(opened(folder)) - 1
    assert lost not in [rest.path(row) for row in range(len(rest))]


def test_a_run_knows_when_one_changed(folder: Path) -> None:
    made = beside(folder)
    before = conditioned(folder, ("edges", "controlnet")).identity()
    path = next(made.rglob("*.webp"))
    Image.new("RGB", Image.open(path).size, "green").save(path, lossless=True)
    after = conditioned(folder, ("edges", "controlnet")).identity()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"controlnet edges: pictures"}


def test_several_sets_go_together_and_the_preview_shows_them(folder: Path) -> None:
    beside(folder)
    beside(folder, name="style")
    source = conditioned(folder, ("edges", "controlnet"), ("style", "reference_loose"))
    shown = look(source, 0)
    assert [name for name, _ in shown.conditions] == ["edges", "style"]
    alone = look(conditioned(folder), 0)
    assert sheet([shown]).tobytes() != sheet([alone]).tobytes()
    assert len(page([shown])) > len(page([alone]))
