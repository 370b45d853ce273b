from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simpletuner.core.errors import DataError
from simpletuner.core.events import Bus
from simpletuner.core.files import content_digest
from simpletuner.core.seeds import Seeds
from simpletuner.data.excluded import Excluded
from simpletuner.data.pixels import PictureError
from simpletuner.data.plan import BatchPlan
from simpletuner.data.source import DataSource
from tests.unit.data.making import SEEDS, entry, opened, picture, told


def test_rows_are_the_pictures_in_the_order_of_their_paths(folder: Path) -> None:
    source = opened(folder)
    assert len(source) == 3
    assert [source.path(row) for row in range(3)] == ["a_cat.png", "deep/er/ox.png", "dog.png"]
    assert source.buckets.tolist() == [[80, 56], [64, 64], [56, 80]]
    assert source.buckets.dtype == np.int32
    for row in range(3):
        digest = content_digest((folder / source.path(row)).read_bytes())
        assert bytes(source.content[row]).hex() == digest
        assert int(source.keys[row]) == int(digest[:16], 16)
    assert source.keys.dtype == np.uint64


def test_pixels_are_what_the_geometry_says(folder: Path) -> None:
    source = opened(folder, crop_style="center")
    geometry = source.geometry(0)
    assert (geometry.source, geometry.resize, geometry.target) == ((96, 64), (84, 56), (80, 56))
    with Image.open(folder / "a_cat.png") as image:
        resized = np.asarray(image.resize((84, 56), Image.Resampling.LANCZOS))
    assert np.array_equal(source.pixels(0), resized[:, 2:82])
    sample = source.sample(0, 0, 0, SEEDS)
    assert sample.geometry == geometry
    assert np.array_equal(source.pixels(sample), source.pixels(0))


def test_transparent_pictures_show_the_background_of_the_settings(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "data" / "clear.png")
    source = opened(tmp_path / "data", image_background="#102030")
    assert (source.pixels(0) == [0x10, 0x20, 0x30]).all()


def test_a_renamed_picture_keeps_its_key_and_place_in_the_plan(folder: Path) -> None:
    def order(source: DataSource) -> list[list[bytes]]:
        plan = BatchPlan.of(
            [source], train_batch_size=1, gradient_accumulation_steps=1, seeds=SEEDS
        )
        windows = [plan.window(step) for step in range(plan.windows_per_epoch)]
        return [[bytes(source.content[r]) for r in batch.rows] for w in windows for batch in w]

    before = opened(folder)
    geometry = before.geometry(0)
    (folder / "a_cat.png").rename(folder / "zebra.png")
    after = opened(folder)
    assert sorted(before.keys) == sorted(after.keys)
    assert order(after) == order(before)
    row = int(np.flatnonzero(after.content == before.content[0])[0])
    assert after.path(row) == "zebra.png"
    assert after.geometry(row) == geometry


def test_an_edited_picture_changes_its_own_key_only(folder: Path) -> None:
    before = opened(folder)
    picture(folder, "dog.png", (65, 96))
    after = opened(folder)
    assert (before.keys == after.keys).tolist() == [True, True, False]


def test_the_folder_is_not_written_to_and_may_be_read_only(folder: Path) -> None:
    def state() -> list[tuple[str, int]]:
        return sorted((str(p), p.lstat().st_mtime_ns) for p in [folder, *folder.rglob("*")])

    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = state()
    try:
        source = opened(folder)
        source.pixels(0)
        assert state() == before
    finally:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)


@pytest.mark.parametrize("name", ["train", "state", "a/b", "../up", "katzen-ü-猫", "a b"])
def test_any_id_makes_one_safe_file_of_its_own(folder: Path, tmp_path: Path, name: str) -> None:
    cache = tmp_path / "cache"
    settings = entry(folder).model_copy(update={"id": name})
    source = DataSource.open(settings, index_folder=cache, bus=Bus())
    opened(folder, cache, id="a_b")
    assert source.id == name
    assert len(list(cache.iterdir())) == 2
    assert source.sample(0, 0, 0, SEEDS).dataset == name


def test_two_opens_and_another_machine_find_the_same(folder: Path, tmp_path: Path) -> None:
    first = opened(folder, crop=True, crop_style="random")
    copy = tmp_path / "copy"
    for path in sorted(folder.rglob("*.png"), reverse=True):
        (copy / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (copy / path.relative_to(folder)).write_bytes(path.read_bytes())
    second = opened(copy, tmp_path / "other", crop=True, crop_style="random")
    for row in range(3):
        assert first.sample(row, 1, 0, SEEDS) == second.sample(row, 1, 0, SEEDS)
        assert np.array_equal(first.pixels(row), second.pixels(row))


# ---- captions


def test_captions_come_from_text_files_with_any_line_ends(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name, text in (
        ("a", b"\xef\xbb\xbfone\r\ntwo\r\n"),
        ("b", "café".encode("cp1252")),
        ("c", b"   "),
        ("d", "cafe\u0301 \n".encode()),
    ):
        picture(data, f"{name}.png")
        (data / f"{name}.txt").write_bytes(text)
    source, said = told(data, caption_strategy="textfile")
    assert [source.captions(row) for row in range(4)] == [
        ("one", "two"),
        ("café",),
        ("",),
        ("café",),
    ]
    assert sorted(source.all_captions()) == ["", "café", "one", "two"]
    assert "read as cp1252: b.txt" in said


def test_all_captions_hold_the_empty_one_if_dropout_can_happen(folder: Path) -> None:
    assert sorted(opened(folder).all_captions()) == ["a cat", "dog", "ox"]
    assert "" in opened(folder, caption_dropout_probability=0.1).all_captions()


def test_every_drawn_caption_is_among_all_captions(tmp_path: Path) -> None:
    data = tmp_path / "data"
    picture(data, "a.png", caption="one\ntwo")
    source = opened(
        data,
        caption_strategy="textfile",
        instance_prompt=["sks", "zwx"],
        prepend_instance_prompt=True,
        caption_dropout_probability=0.2,
    )
    drawn = {source.sample(0, epoch, 0, SEEDS).caption for epoch in range(200)}
    assert set(drawn) == source.all_captions()
    assert drawn == {"", "sks one", "sks two", "zwx one", "zwx two"}


def test_only_instance_prompt_needs_no_text_file(folder: Path) -> None:
    source = opened(
        folder, caption_strategy="textfile", only_instance_prompt=True, instance_prompt="sks"
    )
    assert sorted(source.all_captions()) == ["sks"]


def test_dropout_is_as_frequent_as_asked_and_keyed_by_the_draw(folder: Path) -> None:
    source = opened(folder, caption_dropout_probability=0.25)
    dropped = [not source.sample(0, epoch, 0, SEEDS).caption for epoch in range(2000)]
    assert 0.22 < np.mean(dropped) < 0.28
    for other in (
        [not source.sample(1, epoch, 0, SEEDS).caption for epoch in range(2000)],
        [not source.sample(0, epoch, 1, SEEDS).caption for epoch in range(2000)],
        [not source.sample(0, epoch, 0, Seeds(1)).caption for epoch in range(2000)],
    ):
        assert other != dropped
    assert not opened(folder, caption_dropout_probability=1).sample(0, 0, 0, SEEDS).caption


def test_a_strategy_of_another_kind_reads_the_texts_again(tmp_path: Path) -> None:
    data = tmp_path / "data"
    picture(data, "a.png", caption="from text")
    assert opened(data).captions(0) == ("a",)
    assert opened(data, caption_strategy="textfile").captions(0) == ("from text",)
    assert opened(data).captions(0) == ("a",)


def test_every_variant_of_a_caption_is_listed_and_drawn(tmp_path: Path) -> None:
    data = tmp_path / "data"
    picture(data, "a.png", caption="a, b, c, d, e, f, g")
    shuffle = {"enable": True, "count": 5, "seed": 3, "position_start": 1}
    source = opened(
        data, caption_strategy="textfile", caption_shuffle=shuffle, caption_suffix=", end"
    )
    drawn = {source.sample(0, epoch, 0, SEEDS).caption for epoch in range(200)}
    assert set(drawn) == source.all_captions()
    assert len(drawn) == 6
    assert all(text.startswith("a, ") and text.endswith(", end") for text in drawn)
    off = opened(data, caption_strategy="textfile", caption_shuffle={**shuffle, "enable": False})
    assert off.all_captions() == {"a, b, c, d, e, f, g"}


def test_a_filter_changes_the_captions_it_finds_something_in_and_no_other(folder: Path) -> None:
    before, after = opened(folder), opened(folder, caption_filter_list=("^a ",))
    assert before.all_captions() == {"a cat", "dog", "ox"}
    assert after.all_captions() == {"cat", "dog", "ox"}


@pytest.mark.parametrize(
    "change",
    [
        {"caption_filter_list": ("^a ",)},
        {"caption_shuffle": {"enable": True, "seed": 1}},
        {"caption_prefix": "photo of"},
        {"caption_suffix": "at night"},
        {"trigger_word": "zwx", "prepend_trigger_word": True},
    ],
)
def test_what_edits_captions_is_part_of_what_a_resume_compares(
    folder: Path, change: dict[str, Any]
) -> None:
    plain = opened(folder)
    assert plain.caption_digest() == opened(folder).caption_digest()
    assert plain.caption_digest() != opened(folder, **change).caption_digest()
    off = {"caption_shuffle": {"enable": False, "count": 3}}
    assert plain.caption_digest() == opened(folder, **off).caption_digest()


def test_a_trigger_word_is_not_put_before_regularisation_pictures(folder: Path) -> None:
    word = {"trigger_word": "zwx", "prepend_trigger_word": True}
    assert opened(folder, **word).captions(0) == ("zwx a cat",)
    assert opened(folder, is_regularisation_data=True, **word).captions(0) == ("a cat",)


def test_a_placeholder_without_a_trigger_word_is_told(tmp_path: Path) -> None:
    data = tmp_path / "data"
    picture(data, "a.png", caption="a [trigger] cat")
    picture(data, "b.png", caption="a dog")
    source, said = told(data, caption_strategy="textfile", trigger_word="zwx")
    assert sorted(source.all_captions()) == ["a dog", "a zwx cat"]
    assert "[trigger]" not in said
    _, said = told(data, caption_strategy="textfile")
    assert "1 caption holds [trigger] and there is no trigger_word" in said


def test_a_default_caption_stands_for_missing_texts_and_not_for_unreadable_ones(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    for name in "abcd":
        picture(data, f"{name}.png", caption="own" if name == "a" else None)
    (data / "d.txt").write_bytes(b"\x81\x8d\xff")
    source, said = told(data, caption_strategy="textfile", default_caption="a thing")
    assert [source.captions(row) for row in range(3)] == [("own",), ("a thing",), ("a thing",)]
    assert source.rejects == {"d.png": "caption is neither UTF-8 nor cp1252"}
    assert "2 pictures without a text file, captioned by default_caption" in said


def test_the_default_text_of_a_folder_holds_for_its_pictures_without_one(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for path in ("a.png", "cats/b.png", "cats/c.png"):
        picture(data, path)
    (data / "cats" / "default.txt").write_text("a cat")
    (data / "cats" / "b.txt").write_text("my cat")
    rest = {"caption_strategy": "textfile", "default_caption": "a thing"}
    source, said = told(data, **rest)
    assert [source.captions(row) for row in range(3)] == [("a thing",), ("my cat",), ("a cat",)]
    assert "take the default.txt of their folder: 1" in said
    (data / "cats" / "c.txt").write_text("its own")
    (data / "cats" / "b.txt").unlink()
    again = opened(data, tmp_path / "c", **rest)
    assert [again.captions(row) for row in range(3)] == [("a thing",), ("a cat",), ("its own",)]


def test_a_text_that_gives_way_to_one_of_its_folder_is_read_again(tmp_path: Path) -> None:
    data = tmp_path / "data"
    picture(data, "a.png", caption="my own")
    (data / "default.txt").write_text("common")  # as long, and as old
    for text in data.glob("*.txt"):
        os.utime(text, (1_700_000_000, 1_700_000_000))
    assert opened(data, caption_strategy="textfile").captions(0) == ("my own",)
    (data / "a.txt").unlink()
    assert opened(data, caption_strategy="textfile").captions(0) == ("common",)


def test_what_an_older_decoder_refused_is_looked_at_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(folder / "dog.png", (1_700_000_000, 1_700_000_000))
    opened(folder).remember({"dog.png": "cannot be decoded"})
    assert "dog.png" in opened(folder).rejects
    monkeypatch.setattr("simpletuner.data.index.DECODER", b"99")
    assert not opened(folder).rejects


def test_a_picture_called_default_keeps_its_text_for_itself(tmp_path: Path) -> None:
    data = tmp_path / "data"
    picture(data, "default.png", caption="only mine")
    picture(data, "other.png")
    source = opened(data, caption_strategy="textfile")
    assert [source.path(row) for row in range(len(source))] == ["default.png"]


# ---- crops


def test_cached_random_crops_depend_on_content_and_dataset_only(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(12):
        picture(data, f"{number}.png", (300, 64))
    random = {"crop": True, "crop_style": "random", "resolution_type": "pixel"}
    source = opened(data, **random)
    boxes = [source.geometry(row).crop for row in range(12)]
    assert len(set(boxes)) > 6
    assert [source.sample(row, 5, 1, Seeds(9)).geometry.crop for row in range(12)] == boxes
    assert [opened(data, id="x", **random).geometry(row).crop for row in range(12)] != boxes


def test_without_a_cache_random_crops_are_drawn_at_every_visit(tmp_path: Path) -> None:
    data = tmp_path / "data"
    picture(data, "a.png", (300, 64))
    source = opened(
        data, crop=True, crop_style="random", resolution_type="pixel", vae_cache_disable=True
    )
    boxes = {
        source.sample(0, epoch, occurrence, SEEDS).geometry.crop
        for epoch in range(5)
        for occurrence in range(3)
    }
    assert len(boxes) > 8
    assert source.sample(0, 3, 1, SEEDS) == source.sample(0, 3, 1, SEEDS)


# ---- what cannot be used


def broken(folder: Path, count: int) -> None:
    for number in range(count):
        (folder / f"broken{number:02}.png").write_bytes(b"nothing")


def test_a_missing_and_an_empty_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        opened(tmp_path / "nowhere")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "song.mp3").write_bytes(b"x")
    with pytest.raises(DataError, match=r"dataset cats: there are no pictures in .*\.png"):
        opened(tmp_path / "data")


def test_a_broken_picture_is_named_and_the_others_are_used(folder: Path) -> None:
    broken(folder, 1)
    source, said = told(folder)
    assert len(source) == 3
    assert source.rejects == {"broken00.png": "not a picture"}
    assert "1 picture cannot be used\n  broken00.png: not a picture" in said


def test_a_picture_without_a_text_is_a_fault(tmp_path: Path) -> None:
    data = tmp_path / "data"
    picture(data, "a.png", caption="a")
    picture(data, "b.png")
    source, said = told(data, caption_strategy="textfile")
    assert source.rejects == {"b.png": "no caption"}
    assert "b.png: no caption" in said


def test_too_many_faults_stop_the_run_with_the_first_ten(folder: Path) -> None:
    broken(folder, 12)
    with pytest.raises(DataError) as raised:
        opened(folder)
    text = str(raised.value)
    assert "dataset cats: 12 of 15 pictures cannot be used" in text
    assert "broken09.png: not a picture" in text
    assert "broken10.png" not in text
    assert "and 2 more" in text
    assert "allow_excluded" in text
    assert len(opened(folder, allow_excluded=True)) == 3


@pytest.mark.parametrize(("faults", "fine"), [(2, True), (3, False)])
def test_two_faults_are_always_allowed(folder: Path, faults: int, fine: bool) -> None:
    broken(folder, faults)
    if fine:
        assert len(opened(folder)) == 3
    else:
        with pytest.raises(DataError, match="3 of 6"):
            opened(folder)


def test_five_percent_of_faults_are_allowed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(57):
        picture(data, f"{number}.png", (8, 8))
    broken(data, 3)
    assert len(opened(data)) == 57
    broken(data, 4)
    with pytest.raises(DataError, match="4 of 61"):
        opened(data)


def test_filters_are_counted_and_are_no_faults(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(10):
        picture(data, f"small{number}.png", (20, 20))
        picture(data, f"wide{number}.png", (400, 50))
    picture(data, "good.png", (100, 100))
    source = opened(data, minimum_image_size=64, maximum_aspect_ratio=2)
    assert [source.path(0)] == ["good.png"]
    assert len(source) == 1
    assert source.excluded() == (
        Excluded("minimum_image_size", 10, "small0.png"),
        Excluded("maximum_aspect_ratio", 10, "wide0.png"),
    )


def test_nothing_left_is_an_error_that_counts_each_stage(folder: Path) -> None:
    broken(folder, 1)
    with pytest.raises(DataError) as raised:
        opened(folder, minimum_image_size=70, minimum_aspect_ratio=2)
    assert raised.value.fix == "mend what is named, or widen the settings that leave pictures out"
    assert raised.value.message == (
        "dataset cats: nothing is left to train on\n"
        "  4 pictures found\n"
        "  1 cannot be used\n"
        "  1 left out by minimum_image_size\n"
        "  2 left out by minimum_aspect_ratio\n"
        "  0 left\n"
        "  broken00.png: not a picture"
    )


def test_only_broken_pictures_are_nothing_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    broken(tmp_path / "data", 1)
    with pytest.raises(DataError, match="nothing is left to train on"):
        opened(tmp_path / "data")


def test_enlarged_pictures_and_copies_are_told(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "dog.png").read_bytes())
    source, said = told(folder, resolution=128)
    assert source.enlarged == 4
    assert "1 picture with exactly the bytes of another" in said


def test_a_file_changed_after_the_scan_is_named(folder: Path) -> None:
    source = opened(folder)
    picture(folder, "a_cat.png", (50, 50))
    with pytest.raises(
        DataError, match=r"dataset cats: a_cat.png was changed after it was indexed"
    ):
        source.pixels(0)


def test_a_file_that_cannot_be_decoded_is_named_and_can_be_left_out(folder: Path) -> None:
    path = folder / "a_cat.png"
    path.write_bytes(path.read_bytes()[:-3000])
    os.utime(path, (time.time() - 60,) * 2)
    source = opened(folder)
    assert len(source) == 3
    with pytest.raises(PictureError, match=r"dataset cats: a_cat.png cannot be decoded") as raised:
        source.pixels(0)
    smaller = source.without({"a_cat.png": raised.value.reason})
    assert [smaller.path(row) for row in range(2)] == ["deep/er/ox.png", "dog.png"]
    assert opened(folder).rejects == {"a_cat.png": raised.value.reason}
    assert raised.value.reason.startswith("cannot be decoded: ")
    picture(folder, "a_cat.png")
    assert not opened(folder).rejects


def test_a_file_removed_after_the_scan_is_named(folder: Path) -> None:
    source = opened(folder)
    (folder / "a_cat.png").unlink()
    with pytest.raises(PictureError, match=r"a_cat.png cannot be read: No such file"):
        source.pixels(0)


def test_copies_of_a_picture_that_is_left_out_are_left_out_too(folder: Path) -> None:
    (folder / "again.png").write_bytes((folder / "dog.png").read_bytes())
    smaller = opened(folder).without({"dog.png": "bad"})
    assert smaller.rejects == {"again.png": "bad", "dog.png": "bad"}
    assert len(smaller) == 2


def test_leaving_out_too_many_is_an_error(folder: Path) -> None:
    picture(folder, "fourth.png")
    reasons = {"a_cat.png": "bad", "dog.png": "bad", "fourth.png": "worse"}
    with pytest.raises(DataError, match="3 of 4 pictures cannot be used"):
        opened(folder).without(reasons)
