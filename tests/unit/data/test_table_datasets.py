"""Datasets with a metadata table, opened as a run opens them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simpletuner.core.errors import DataError
from simpletuner.core.events import Bus, Notice
from simpletuner.data.pixels import PictureError
from simpletuner.data.settings import DatasetSettings, DataSettings, inherit
from simpletuner.data.source import DataSource
from tests.unit.data.making import Heard, picture
from tests.unit.data.serving import Site, served


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("image_1.png", "image_2.png", "in/image_3.png"):
        picture(tmp_path / "data", name, (64, 96))
    return tmp_path / "data"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "*")
    with served() as found:
        yield found


def table(folder: Path, *rows: tuple[object, object], name: str = "metadata.csv") -> Path:
    path = folder / name
    if name.endswith(".jsonl"):
        lines = [json.dumps({"image": image, "prompt": prompt}) for image, prompt in rows]
    else:
        lines = ["image,prompt", *(f'{image},"{prompt}"' for image, prompt in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def told(folder: Path, data: DataSettings | None = None, **keys: Any) -> tuple[DataSource, str]:
    given = {"id": "cats", "instance_data_dir": folder, "resolution": 64, "max_workers": 2}
    given |= {"aspect_bucket_alignment": 8, "caption_dropout_probability": 0, **keys}
    entry = DatasetSettings(**{key: value for key, value in given.items() if value is not None})
    settings = inherit(entry, data or DataSettings(), vae_root=Path("vae"))
    heard = Heard()
    bus = Bus([heard])
    try:
        source = DataSource.open(settings, index_folder=folder.parent / "index", bus=bus)
    finally:
        bus.close()
    return source, "\n".join(event.text for event in heard.events if isinstance(event, Notice))


def captions(source: DataSource) -> dict[str, tuple[str, ...]]:
    return {source.path(row): source.captions(row) for row in range(len(source))}


SEED = (("image_1.png", "a dog"), ("image_2.png", "a cat"), ("in/image_3.png", "a cat, asleep"))


def test_a_table_of_pictures_and_prompts_is_a_dataset(folder: Path) -> None:
    source, _ = told(folder, dataset_metadata_path=table(folder, *SEED))
    assert captions(source) == {path: (text,) for path, text in SEED}
    assert source.excluded() == ()


def test_the_folder_of_a_table_is_where_its_paths_start_unless_there_is_another(
    folder: Path,
) -> None:
    within, _ = told(folder, instance_data_dir=None, dataset_metadata_path=table(folder, *SEED))
    elsewhere = table(folder.parent, *SEED)
    without, _ = told(folder, dataset_metadata_path=elsewhere)
    assert captions(within) == captions(without)
    absolute = [(folder / path, text) for path, text in SEED]
    named, _ = told(
        folder, instance_data_dir=None, dataset_metadata_path=table(folder.parent, *absolute)
    )
    assert sorted(captions(named).values()) == sorted(captions(within).values())


def test_dataset_repeat_counts_from_one(folder: Path) -> None:
    path = table(folder, *SEED)
    assert told(folder, dataset_metadata_path=path)[0].repeats == 0
    assert told(folder, dataset_metadata_path=path, dataset_repeat=1)[0].repeats == 0
    assert told(folder, dataset_metadata_path=path, dataset_repeat=50)[0].repeats == 49


def test_a_changed_row_changes_the_caption_of_its_picture_and_no_other(folder: Path) -> None:
    before, _ = told(folder, dataset_metadata_path=table(folder, *SEED))
    changed = (*SEED[:2], ("in/image_3.png", "a dog, asleep"))
    after, _ = told(folder, dataset_metadata_path=table(folder, *changed))
    assert set(before.all_captions()) ^ set(after.all_captions()) == {
        "a cat, asleep",
        "a dog, asleep",
    }
    assert before.identity()["captions"] != after.identity()["captions"]


def test_the_order_of_rows_and_the_kind_of_table_change_nothing(folder: Path) -> None:
    ways = [
        told(folder, dataset_metadata_path=table(folder, *rows, name=name))[0]
        for rows in (SEED, SEED[::-1])
        for name in ("metadata.csv", "metadata.jsonl")
    ]
    assert len({str((way.identity(), captions(way))) for way in ways}) == 1


def test_a_text_in_the_table_means_what_it_means_in_a_file(folder: Path) -> None:
    for path, text in SEED:
        (folder / path).with_suffix(".txt").write_text(text, encoding="utf-8")
    files, _ = told(folder, caption_strategy="textfile")
    rows, _ = told(folder, dataset_metadata_path=table(folder, *SEED))
    assert captions(files) == captions(rows)
    own, _ = told(folder, dataset_metadata_path=table(folder, *SEED), caption_strategy="filename")
    assert captions(own)["image_1.png"] == ("image 1",)


def test_a_list_is_several_captions_of_which_each_is_encoded(folder: Path) -> None:
    rows = (("image_1.png", ["a dog\nthat sits", "a pet"]), *SEED[1:])
    source, _ = told(folder, dataset_metadata_path=table(folder, *rows, name="metadata.jsonl"))
    assert captions(source)["image_1.png"] == ("a dog\nthat sits", "a pet")
    assert sorted(source.all_captions()) == ["a cat", "a cat, asleep", "a dog\nthat sits", "a pet"]


def test_files_without_a_row_and_rows_without_a_file_are_counted_and_named(folder: Path) -> None:
    rows = (*SEED[:2], ("gone.png", "x"), ("in", "a folder"))
    path = table(folder, *rows)
    source, said = told(folder, dataset_metadata_path=path, allow_excluded=True)
    assert list(captions(source)) == ["image_1.png", "image_2.png"]
    assert source.rejects == {
        "gone.png": "there is no such file",
        "in": "cannot be read: not a file",
    }
    assert source.found == 5
    assert {(e.reason, e.count, e.example) for e in source.excluded()} == {
        ("there is no such file", 1, "gone.png"),
        ("cannot be read: not a file", 1, "in"),
        ("metadata_backend", 1, "in/image_3.png"),
    }
    assert "gone.png: there is no such file" in said
    rest = source.without({"image_1.png": "odd"})
    assert (rest.found, len(rest)) == (5, 1)


def test_too_many_rows_without_a_file_are_an_error(folder: Path) -> None:
    rows = [*SEED, *((f"gone{n}.png", "x") for n in range(3))]
    with pytest.raises(DataError, match="3 of 6 pictures cannot be used\n  gone0"):
        told(folder, dataset_metadata_path=table(folder, *rows))
    source, _ = told(folder, dataset_metadata_path=table(folder, *rows), allow_excluded=True)
    assert len(source) == 3


def test_a_row_without_a_caption_takes_the_default_or_is_told(folder: Path) -> None:
    path = table(folder, *SEED[:2], ("in/image_3.png", ""))
    bare, said = told(folder, dataset_metadata_path=path)
    assert bare.rejects == {"in/image_3.png": "no caption"}
    assert "in/image_3.png: no caption" in said
    filled, said = told(folder, dataset_metadata_path=path, default_caption="a pet")
    assert captions(filled)["in/image_3.png"] == ("a pet",)
    assert "1 picture without a caption in the table, captioned by default_caption" in said


def parquet(folder: Path, **columns: list[Any]) -> dict[str, Any]:
    path = folder.parent / "table.parquet"
    pq.write_table(pa.table(columns), path)
    return {"path": path}


def test_a_parquet_block_finds_files_by_their_stems_in_any_folder(folder: Path) -> None:
    names = ["image_1", "image_2", "image_3"]
    block = parquet(folder, id=names, description=["1", "2", None], tags=["x", "y", "z"])
    source, _ = told(folder, parquet=block, caption_strategy="parquet")
    assert captions(source) == {"image_1.png": ("1",), "image_2.png": ("2",)}
    block["fallback_caption_column"] = "tags"
    source, _ = told(folder, parquet=block, caption_strategy="parquet")
    assert captions(source)["in/image_3.png"] == ("z",)
    block["caption_column"] = ["description", "tags"]
    source, _ = told(folder, parquet=block, caption_strategy="parquet")
    assert captions(source)["image_1.png"] == ("1", "x")
    block["identifier_includes_extension"] = True
    with pytest.raises(DataError, match="no caption"):
        told(folder, parquet=block, caption_strategy="parquet")


def test_rows_decide_only_under_metadata_backend_parquet(folder: Path) -> None:
    block = parquet(folder, id=["image_1", "image_2"], description=["1", "2"])
    keys = {"parquet": block, "caption_strategy": "parquet"}
    rows, _ = told(folder, metadata_backend="parquet", **keys)
    assert list(captions(rows)) == ["image_1.png", "image_2.png"]
    assert rows.rejects == {}
    files, _ = told(folder, **keys, default_caption="other")
    assert captions(files)["in/image_3.png"] == ("other",)
    names, _ = told(folder, metadata_backend="parquet", parquet=block)
    assert captions(names) == {"image_1.png": ("image 1",), "image_2.png": ("image 2",)}


def test_the_columns_of_a_parquet_block_may_be_named_once_for_all(folder: Path) -> None:
    block = parquet(folder, name=["image_1", "image_2", "image_3"], text=["1", "2", "3"])
    data = DataSettings(parquet_filename_column="name", parquet_caption_column="text")
    source, _ = told(folder, data, parquet=block, caption_strategy="parquet")
    assert captions(source)["image_1.png"] == ("1",)


def test_a_size_that_is_not_that_of_the_file_is_told(folder: Path) -> None:
    names, texts = ["image_1", "image_2", "image_3"], ["1", "2", "3"]
    block = parquet(folder, id=names, description=texts, width=[64, 96, 7], height=[96, 64, 96])
    source, said = told(folder, parquet=block, caption_strategy="parquet")
    assert "1 files are not of the size it says, such as in/image_3.png (7x96 there, 64x96" in said
    assert source.sizes.tolist() == [[64, 96]] * 3
    block = parquet(folder, id=names, description=texts, w=[64] * 3, h=[96.0, 96.0, None])
    sizes = {"width_column": "w", "height_column": "h"}
    assert "size" not in told(folder, parquet=block | sizes, caption_strategy="parquet")[1]
    with pytest.raises(DataError, match=r"has no column x.*\n  name one of them with width_column"):
        told(folder, parquet=block | {"width_column": "x"}, caption_strategy="parquet")


def test_addresses_in_a_table_are_fetched_once_and_trained_on(folder: Path, site: Site) -> None:
    urls = [
        site.put(path, (folder / f"image_{n}.png").read_bytes())
        for n, path in ((1, "/a/1.png"), (2, "/b/1.png"))
    ]
    rows = ((urls[0], "one"), (urls[1], "two"), ("in/image_3.png", "three"))
    path = table(folder, *rows)
    for _ in range(2):
        source, _ = told(folder, dataset_metadata_path=path)
        assert captions(source) == {str(file): (text,) for file, text in rows}
        assert source.pixels(0).shape == (80, 56, 3)
    assert site.asked == {"/a/1.png": 1, "/b/1.png": 1}
    local, _ = told(folder, caption_strategy="filename")
    assert sorted(source.keys) == sorted(local.keys), "an address has the content of its file"


def test_an_address_without_a_picture_is_named_with_its_dataset(folder: Path, site: Site) -> None:
    gone = f"{site.address}/gone.png"
    broken = site.put("/broken.png", b"<html>no</html>", kind="text/html")
    rows = (*SEED, (gone, "x"), (broken, "y"))
    source, said = told(folder, dataset_metadata_path=table(folder, *rows))
    assert len(source) == 3
    assert "dataset cats: 2 pictures cannot be used" in said
    assert f"{gone}: cannot be read: 404 Not Found" in said
    assert f"{broken}: cannot be read: answered with text/html instead of a picture" in said
    site.put("/gone.png", (folder / "image_1.png").read_bytes())
    source, _ = told(folder, dataset_metadata_path=table(folder, *rows))
    assert len(source) == 4, "what failed is asked for again at the next start"


def test_an_address_that_is_lost_while_training_names_the_dataset(folder: Path, site: Site) -> None:
    url = site.put("/a.png", (folder / "image_1.png").read_bytes())
    source, _ = told(folder, dataset_metadata_path=table(folder, (url, "x")))
    del site.answers["/a.png"]
    for kept in (folder.parent / "index" / "downloads").rglob("*"):
        if kept.is_file():
            kept.unlink()
    with pytest.raises(PictureError, match="404 Not Found") as caught:
        source.pixels(0)
    assert f"dataset cats: {url}" in str(caught.value)


def test_a_csv_of_addresses_needs_no_folder(folder: Path, site: Site) -> None:
    url = site.put("/1.png", (folder / "image_1.png").read_bytes())
    path = folder.parent / "list.csv"
    path.write_text(f"url,text\n{url},one\n")
    downloads = folder.parent / "kept"
    source, _ = told(
        folder,
        type="csv",
        instance_data_dir=None,
        csv_file=path,
        csv_caption_column="text",
        csv_cache_dir=downloads,
    )
    assert captions(source) == {url: ("one",)}
    assert len([file for file in downloads.rglob("*") if file.is_file()]) == 1
    path.write_text(f"address,text\n{url},one\n")
    source, _ = told(
        folder,
        type="csv",
        instance_data_dir=None,
        csv_file=path,
        csv_url_column="address",
        caption_strategy="instanceprompt",
        instance_prompt="all",
    )
    assert captions(source) == {url: ("all",)}
