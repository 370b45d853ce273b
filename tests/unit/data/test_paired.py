"""Masks are cut as their pictures are, and nothing is trained on without its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simpletuner.core.errors import DataError
from simpletuner.core.events import Bus, Notice, Stage
from simpletuner.core.seeds import Seeds
from simpletuner.data.pixels import PictureError
from simpletuner.data.preview import look, sheet
from simpletuner.data.settings import DatasetSettings
from simpletuner.data.source import DataSource
from tests.unit.data.making import SEEDS, Heard, entry, opened, picture

WHITE = (255, 255, 255)


@pytest.fixture
def masks(folder: Path) -> Path:
    """A mask for each picture: white where the picture is bright."""
    made = folder.parent / "masks"
    for path in folder.rglob("*.png"):
        mask = made / path.relative_to(folder).with_suffix(".bmp")
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("L").point(lambda v: 255 * (v > 127)).save(mask)
    return made


def masked(
    folder: Path, heard: Heard | None = None, bus: Bus | None = None, **rest: Any
) -> DataSource:
    """The dataset of `folder` with the masks in the folder ``masks`` beside it."""
    given = {"id": "m", "conditioning_type": "mask", "instance_data_dir": folder.parent / "masks"}
    ours = bus or Bus([heard] if heard else [])
    try:
        return DataSource.open(
            entry(folder, **rest),
            index_folder=folder.parent / "cache",
            paired=[DatasetSettings(**given)],
            bus=ours,
        )
    finally:
        if bus is None:
            ours.close()


# ---- geometry


@pytest.mark.parametrize("style", ["center", "corner", "random"])
@pytest.mark.parametrize("scale", [1, 2, 0.5])
@pytest.mark.parametrize("fresh", [False, True])
def test_edges_of_mask_and_picture_coincide(
    tmp_path: Path, style: str, scale: float, fresh: bool
) -> None:
    """A square of the picture is its mask, whatever the mask's own size."""
    pictures, beside = tmp_path / "data", tmp_path / "masks"
    pictures.mkdir()
    beside.mkdir()
    image = Image.new("RGB", (240, 160))
    image.paste(WHITE, (90, 50, 160, 110))
    image.save(pictures / "a.png")
    size = (round(240 * scale), round(160 * scale))
    image.resize(size, Image.Resampling.BOX).save(beside / "a.png")

    source = masked(pictures, crop=True, crop_style=style, vae_cache_disable=fresh)

    for epoch in range(3):
        sample = source.sample(0, epoch, 0, SEEDS)
        mask, seen = source.mask(0, sample.geometry), source.pixels(sample)[:, :, 0]
        assert mask.shape == seen.shape == (64, 64)
        assert mask.any()
        for axis in (0, 1):
            edges = [np.flatnonzero((each > 127).any(axis=axis))[[0, -1]] for each in (mask, seen)]
            assert np.abs(edges[0] - edges[1]).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_upright_as_its_picture_is(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("data", "masks"):
        (tmp_path / name).mkdir()
    image = Image.new("RGB", (96, 64))
    image.paste(WHITE, (0, 0, 40, 20))
    image.save(tmp_path / "data" / "a.png", exif=exif)
    image.save(tmp_path / "masks" / "a.png", exif=exif)

    source = masked(tmp_path / "data", crop_style="center")

    mask, seen = source.mask(0, source.geometry(0)), source.pixels(0)[:, :, 0]
    assert np.abs(mask.astype(int) - seen).mean() < 8
    assert 0 < (mask > 127).mean() < 0.3


def test_a_mask_has_no_ringing_and_what_is_transparent_in_it_is_black(tmp_path: Path) -> None:
    picture(tmp_path / "data", "a.png", (200, 200))
    image = Image.new("RGBA", (200, 200), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (0, 0, 100, 200))
    (tmp_path / "masks").mkdir()
    image.save(tmp_path / "masks" / "a.png")

    mask = masked(tmp_path / "data").mask(0, masked(tmp_path / "data").geometry(0))

    assert mask[:, :30].min() == 255
    assert mask[:, 34:].max() == 0
    assert (np.diff(mask.astype(int), axis=1) <= 0).all()


def test_a_colour_counts_by_its_brightness(tmp_path: Path) -> None:
    picture(tmp_path / "data", "a.png", (192, 64))
    image = Image.new("RGB", (192, 64), (0, 255, 255))
    image.paste((255, 0, 0), (64, 0, 128, 64))
    image.paste((77, 77, 77), (128, 0, 192, 64))
    (tmp_path / "masks").mkdir()
    image.save(tmp_path / "masks" / "a.png")
    source = masked(tmp_path / "data", crop=False)

    found = source.mask(0, source.geometry(0))

    cyan, red, grey = (int(found[20, int(found.shape[1] * at)]) for at in (0.16, 0.5, 0.84))
    assert (cyan, red, grey) == (round(255 * 0.701), round(255 * 0.299), 77)


# ---- shape


def test_a_mask_of_another_shape_is_named_not_stretched(folder: Path, masks: Path) -> None:
    Image.new("L", (64, 96)).save(masks / "a_cat.bmp")

    with pytest.raises(DataError) as error:
        masked(folder)

    assert error.value.message == (
        "dataset cats: 1 of 3 pictures cannot be used\n"
        "  a_cat.png: its mask a_cat.bmp is 64x96, the picture 96x64"
    )
    assert len(masked(folder, allow_excluded=True)) == 2


@pytest.mark.parametrize(
    ("of_picture", "of_mask", "fits"),
    [
        ((1000, 667), (125, 83), True),
        ((1000, 667), (125, 84), True),
        ((1000, 667), (125, 82), False),
        ((125, 83), (1000, 667), True),
        ((125, 82), (1000, 667), False),
        ((200, 200), (200, 201), True),
        ((200, 200), (200, 203), False),
    ],
)
def test_a_pixel_of_the_smaller_of_the_two_is_rounding(
    tmp_path: Path, of_picture: tuple[int, int], of_mask: tuple[int, int], fits: bool
) -> None:
    for name, size in (("data", of_picture), ("masks", of_mask)):
        (tmp_path / name).mkdir()
        Image.new("L", size).save(tmp_path / name / "a.png")
        Image.new("L", of_picture).save(tmp_path / name / "always there.png")

    assert len(masked(tmp_path / "data", allow_excluded=True)) == 1 + fits


# ---- what breaks off


def test_a_mask_is_decoded_once_and_again_when_it_changes(folder: Path, masks: Path) -> None:
    for path in masks.rglob("*.bmp"):
        os.utime(path, (1, 1))
    heard = Heard()

    def decoded(**rest: Any) -> tuple[DataSource, list[int]]:
        heard.events.clear()
        bus = Bus([heard])
        source = masked(folder, bus=bus, **rest).with_whole_pairs()
        bus.close()
        told = [e for e in heard.events if isinstance(e, Stage) and e.stage == "masks m"]
        return source, [event.total for event in told if event.state == "finished"]

    assert decoded()[1] == [3]
    assert decoded()[1] == []

    broken = masks / "dog.bmp"
    broken.write_bytes(broken.read_bytes()[:-1000])
    os.utime(broken, (2, 2))
    assert len(masked(folder)) == 3
    source, counts = decoded(allow_excluded=True)
    assert counts == [1]
    (why,) = source.rejects.values()
    assert why.startswith("its mask dog.bmp: cannot be decoded: ")
    assert source.with_whole_pairs() is source
    assert masked(folder, allow_excluded=True).rejects == source.rejects


def test_what_was_decoded_is_kept_when_the_rest_is_broken_off(folder: Path, masks: Path) -> None:
    for path in masks.rglob("*.bmp"):
        os.utime(path, (1, 1))
    source = masked(folder)
    Image.new("L", (64, 96)).save(masks / "dog.bmp")  # the last, for they go by their paths
    os.utime(masks / "dog.bmp", (2, 2))
    with pytest.raises(DataError, match=r"dog.bmp was changed after it was indexed"):
        source.with_whole_pairs()

    heard = Heard()
    bus = Bus([heard])
    source = masked(folder, bus=bus)
    assert source.with_whole_pairs() is source
    bus.close()
    assert [e.total for e in heard.events if isinstance(e, Stage) and e.stage == "masks m"][:1] == [
        1
    ]


def test_a_mask_that_could_not_be_read_is_looked_at_again(folder: Path, masks: Path) -> None:
    for path in masks.rglob("*.bmp"):
        os.utime(path, (1, 1))
    source = masked(folder, allow_excluded=True)
    (masks / "dog.bmp").rename(masks / "away")
    rest = source.with_whole_pairs()
    assert rest.rejects["dog.png"].startswith("its mask dog.bmp: cannot be read: ")

    (masks / "away").rename(masks / "dog.bmp")
    whole = masked(folder)
    assert len(whole) == 3
    assert whole.with_whole_pairs() is whole


# ---- alpha


def test_alpha_is_the_mask_and_the_background_still_shows(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((255, 0, 0, 128), (0, 0, 32, 64))
    image.save(tmp_path / "data" / "a.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "data" / "b.png")
    source = opened(tmp_path / "data", alpha_as_mask=True, image_background="#00ff00")

    mask = source.mask(0, source.geometry(0))

    assert (mask[:, :32] == 128).all()
    assert not mask[:, 32:].any()
    assert (source.pixels(0)[:, 32:] == [0, 255, 0]).all()
    assert (source.mask(1, source.geometry(1)) == 255).all()
    assert source.sample(0, 0, 0, SEEDS).masked
    assert not opened(tmp_path / "data").sample(0, 0, 0, SEEDS).masked


# ---- how often


def test_masks_are_applied_at_a_share_of_visits_that_the_seed_decides(
    folder: Path, masks: Path
) -> None:
    source = masked(folder, masked_loss_probability=0.3)

    def drawn(seeds: Seeds) -> list[bool]:
        return [source.sample(i % 3, i, 0, seeds).masked for i in range(600)]

    assert 0.25 < np.mean(drawn(SEEDS)) < 0.35
    assert drawn(SEEDS) == drawn(SEEDS) != drawn(Seeds(1))
    assert all(masked(folder).sample(0, epoch, 0, SEEDS).masked for epoch in range(20))


# ---- what has none


def test_a_picture_without_a_mask_is_an_error_that_names_it(folder: Path, masks: Path) -> None:
    (masks / "dog.bmp").rename(masks / "dig.bmp")
    picture(folder, "fox.png", (64, 64))
    for ending in ("bmp", "tif"):
        Image.new("L", (64, 64)).save(masks / f"fox.{ending}")

    with pytest.raises(DataError) as error:
        masked(folder)

    assert error.value.message == (
        "dataset cats: 2 of 4 pictures cannot be used\n"
        "  dog.png: no mask in m\n"
        "  fox.png: several masks in m\n"
        "1 mask in m is left over:\n"
        "  dig.bmp: no picture in cats"
    )
    assert "allow_excluded" in str(error.value)


def test_pictures_without_masks_are_left_out_where_that_is_allowed(
    folder: Path, masks: Path
) -> None:
    (masks / "deep/er/ox.bmp").write_bytes(b"no picture")
    heard = Heard()

    source = masked(folder, heard, allow_excluded=True)

    assert [source.path(row) for row in range(len(source))] == ["a_cat.png", "dog.png"]
    assert source.rejects == {"deep/er/ox.png": "its mask deep/er/ox.bmp: not a picture"}
    for row, name in enumerate(("a_cat", "dog")):
        geometry = source.geometry(row)
        assert np.array_equal(
            source.mask(row, geometry) > 127,
            np.asarray(_cut(masks / f"{name}.bmp", geometry)) > 127,
        )


def test_a_mask_without_a_picture_is_told(folder: Path, masks: Path) -> None:
    Image.new("L", (8, 8)).save(masks / "more.png")
    heard = Heard()

    assert len(masked(folder, heard)) == 3

    told = [event for event in heard.events if isinstance(event, Notice)]
    assert [(event.level, event.text) for event in told] == [
        ("warning", "dataset cats: 1 mask in m is left over:\n  more.png: no picture in cats")
    ]


def test_a_folder_of_masks_for_other_pictures_leaves_nothing(folder: Path) -> None:
    (folder.parent / "masks").mkdir()
    with pytest.raises(DataError, match=r"nothing is left to train on[^$]*a_cat.png: no mask in m"):
        masked(folder, allow_excluded=True)


def test_a_mask_is_read_as_it_was_indexed_or_not_at_all(folder: Path, masks: Path) -> None:
    source = masked(folder)
    Image.new("L", (8, 8)).save(masks / "a_cat.bmp")
    with pytest.raises(DataError, match=r"dataset m: a_cat.bmp was changed after it was indexed"):
        source.mask(0, source.geometry(0))
    (masks / "a_cat.bmp").unlink()
    with pytest.raises(PictureError, match=r"dataset m: a_cat.bmp cannot be read"):
        source.mask(0, source.geometry(0))


# ---- preview


def test_a_preview_tints_what_is_not_learned(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    image = Image.new("RGBA", (64, 64), (0, 0, 255, 0))
    image.paste((0, 0, 255, 255), (0, 0, 32, 64))
    image.save(tmp_path / "data" / "a.png")
    source = opened(tmp_path / "data", alpha_as_mask=True, image_background="#0000ff")

    made = np.asarray(sheet([look(source, 0)]))

    left, right = (made[100, x].tolist() for x in (8 + 240 + 8 + 40, 8 + 240 + 8 + 200))
    assert left == [0, 0, 255]
    assert right[0] > 100 > right[1]


# ---- identity


def test_a_changed_mask_changes_the_identity_and_a_renamed_pair_does_not(
    folder: Path, masks: Path
) -> None:
    before = masked(folder, caption_strategy="instanceprompt", instance_prompt="x")
    (folder / "dog.png").rename(folder / "hound.png")
    (masks / "dog.bmp").rename(masks / "hound.bmp")
    again = masked(folder, caption_strategy="instanceprompt", instance_prompt="x")
    assert again.identity() == before.identity()

    Image.new("L", (64, 96), 200).save(masks / "hound.bmp")
    changed = masked(folder, caption_strategy="instanceprompt", instance_prompt="x").identity()

    assert {k for k, v in changed.items() if v != before.identity()[k]} == {"masks"}


def test_the_identity_tells_how_pictures_are_learned(folder: Path, masks: Path) -> None:
    plain = opened(folder).identity()

    def changed(source: DataSource) -> set[str]:
        return {name for name, value in source.identity().items() if value != plain[name]}

    assert changed(opened(folder, is_regularisation_data=True)) == {"is_regularisation_data"}
    assert changed(opened(folder, masked_loss_probability=0.5)) == set()
    with_alpha = opened(folder, alpha_as_mask=True, masked_loss_probability=0.5)
    assert changed(with_alpha) == {"masks", "masked_loss_probability"}
    assert changed(masked(folder)) == {"masks", "masked_loss_probability"}


def _cut(mask: Path, geometry: Any) -> Image.Image:
    left, top, width, height = geometry.crop
    with Image.open(mask) as image:
        resized = image.convert("L").resize(geometry.resize, Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + width, top + height))
