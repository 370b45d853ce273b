"""Metadata tables: every format says the same, and what is odd in them is read or named."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simpletuner.core.errors import DataError
from simpletuner.core.events import Bus, Notice
from simpletuner.data.captions import SEPARATOR
from simpletuner.data.excluded import Excluded, listed
from simpletuner.data.metadata import MetadataTable, TableRule
from tests.unit.data.making import Heard

ROWS = [
    {"image": "0012", "prompt": "an “ö”, and\nmore", "width": 30},
    {"image": "b/ü.png", "prompt": "2020-01-01", "width": None},
    {"image": "c.png", "prompt": None, "width": 7},
]


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    def cell(value: object) -> str:
        return "" if value is None else '"' + str(value).replace('"', '""') + '"'

    lines = [",".join(rows[0]), *(",".join(cell(row[k]) for k in rows[0]) for row in rows)]
    return "\r\n".join(lines).encode()


def write(folder: Path, ending: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"table.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending == "csv":
        path.write_bytes(as_csv(rows))
    elif ending == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def read(path: Path, **rest: Any) -> tuple[MetadataTable, str]:
    heard = Heard()
    bus = Bus([heard])
    rule = TableRule(path, **{"files": ("image",), "captions": ("prompt",), **rest})
    table = MetadataTable.read(rule, bus)
    bus.close()
    return table, "\n".join(event.text for event in heard.events if isinstance(event, Notice))


def captions(table: MetadataTable) -> dict[str, list[str] | None]:
    told = zip(table.files.to_pylist(), table.captions.to_pylist(), strict=True)
    return {file: text and text.split(SEPARATOR) for file, text in told}


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
def test_every_format_says_the_same(tmp_path: Path, ending: str) -> None:
    table, said = read(write(tmp_path, ending, ROWS))
    assert captions(table) == {
        "0012": ["an “ö”, and\nmore"],
        "b/ü.png": ["2020-01-01"],
        "c.png": None,
    }
    assert table.sizes[:, 0].tolist()[::2] == [30, 7]
    assert said == ""


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_a_list_is_several_captions_and_empty_ones_are_none(tmp_path: Path, ending: str) -> None:
    lists = [["x", " y ", ""], [], None, ["z", None]]
    rows = [{"image": f"{n}.png", "prompt": cell} for n, cell in enumerate(lists)]
    table, _ = read(write(tmp_path, ending, rows))
    assert captions(table) == {
        "0.png": ["x", "y"],
        "1.png": None,
        "2.png": None,
        "3.png": ["z"],
    }


def test_lists_and_texts_may_stand_in_one_json_column(tmp_path: Path) -> None:
    rows = [{"image": "a", "prompt": "x"}, {"image": "b", "prompt": ["y", "z"]}, {"image": "c"}]
    for ending in ("json", "jsonl"):
        table, _ = read(write(tmp_path, ending, rows))
        assert captions(table) == {"a": ["x"], "b": ["y", "z"], "c": None}


def test_several_columns_are_several_captions_and_a_fallback_stands_in(tmp_path: Path) -> None:
    rows = [
        {"image": "a", "long": "l", "short": "s", "tags": "t"},
        {"image": "b", "long": None, "short": "s", "tags": "t"},
        {"image": "c", "long": " ", "short": None, "tags": "t"},
    ]
    table, _ = read(write(tmp_path, "csv", rows), captions=("long", "short"), fallback="tags")
    assert captions(table) == {"a": ["l", "s"], "b": ["s"], "c": ["t"]}


def test_the_order_of_rows_changes_nothing_and_a_file_counts_once(tmp_path: Path) -> None:
    rows = [
        {"image": "./b", "prompt": "2"},
        {"image": "a", "prompt": "1"},
        {"image": "b", "prompt": "1"},
        {"image": "b", "prompt": "2"},
        {"image": "b", "prompt": None},
    ]
    first, said = read(write(tmp_path, "csv", rows))
    second, _ = read(write(tmp_path, "jsonl", rows[::-1]))
    assert captions(first) == captions(second) == {"a": ["1"], "b": ["1", "2"]}
    assert "1 files stand in several rows, such as b" in said


def test_rows_that_name_no_file_are_counted_and_the_first_filled_column_counts(
    tmp_path: Path,
) -> None:
    rows = [
        {"image": "a", "video": None, "prompt": "x"},
        {"image": None, "video": "b", "prompt": "x"},
        {"image": None, "video": None, "prompt": "x"},
        {"image": "c", "video": "d", "prompt": "x"},
    ]
    table, said = read(write(tmp_path, "csv", rows), files=("image", "video", "none"))
    assert table.files.to_pylist() == ["a", "b", "c"]
    assert "1 rows name no file, such as row 3" in said
    assert "1 files of the column video are not used" in said


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (b"\xef\xbb\xbfimage,prompt\na,caf\xc3\xa9\n", ""),
        ("image,prompt\na,café\n".encode("cp1252"), "is not UTF-8, read as cp1252"),
        ("image,prompt\na,café\n".encode("utf-16"), ""),
        ("image,prompt\r\na,cafe\u0301\r\n\r\n".encode(), ""),
    ],
)
def test_encodings_of_tables_are_read_as_those_of_captions(
    tmp_path: Path, data: bytes, encoding: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(data)
    table, said = read(path)
    assert captions(table) == {"a": ["café"]}
    assert said.endswith(encoding)
    assert bool(said) == bool(encoding)


def test_json_with_a_mark_is_read(tmp_path: Path) -> None:
    for ending in ("json", "jsonl"):
        path = tmp_path / f"t.{ending}"
        path.write_bytes(b'\xef\xbb\xbf{"image": "a", "prompt": "x"}')
        assert captions(read(path)[0]) == {"a": ["x"]}


def test_categories_and_numbers_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    columns = {"image": pa.array([7, 8]), "prompt": pa.array(["x", "x"]).dictionary_encode()}
    pq.write_table(pa.table(columns), path)
    assert captions(read(path)[0]) == {"7": ["x"], "8": ["x"]}


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("no.csv", None, "no.csv does not exist\n  correct its path"),
        ("t.txt", b"x", "of an unknown kind\n  use one whose name ends in .csv, .json, .jsonl or"),
        ("t.csv", b"", "cannot be read: Empty CSV file"),
        ("t.csv", b"image,prompt\na,b,c\n", "Expected 2 columns, got 3: a,b,c\n  mend it; in CSV"),
        (
            "t.csv",
            b"file,prompt\na,b\n",
            "no column image; it has file, prompt\n  name one of them",
        ),
        ("t.csv", b"image,Prompt\na,b\n", "no column prompt; did you mean Prompt?; it has"),
        ("t.csv", b"image,image,prompt\na,b,c\n", "has two columns image"),
        ("t.csv", b"image,prompt\n,b\n", "names no file in image"),
        ("t.csv", b"image,prompt\n", "names no file in image"),
        ("t.json", b'[{"image": "a"}, 7]', "row 2 is no object"),
        ("t.json", b'[{"image": {"bytes": "a"}}]', "row 1: image cannot be {"),
        ("t.json", b'[{"image": "a", "prompt": "x"}', "cannot be read: Expecting"),
        ("t.json", b'[{"image": ["a", "b"], "prompt": "x"}]', "names several files"),
        ("t.jsonl", b'{"image": "a"}\n{"image": "a"\n', "line 2: Expecting"),
        ("t.parquet", b"PAR1", "\n  write or copy it anew; it is damaged, or no Parquet"),
        ("t.json", b"[" * 100_000, "lie too deep in each other"),
        ("t.json", b"[", "\n  mend it; it is a list of objects"),
        ("t.jsonl", b'{"image"', "\n  mend it; it has an object, {…}, on each line"),
    ],
)
def test_a_table_that_cannot_be_used_is_an_error_that_says_why(
    tmp_path: Path, name: str, data: bytes | None, says: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    assert says in str(caught.value)


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_a_folder_is_no_table(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"t.{ending}").mkdir()
    with pytest.raises(DataError, match="is a folder\n  name the file in it"):
        read(tmp_path / f"t.{ending}")


@pytest.mark.parametrize(
    "lines",
    [
        ["image,prompt", "0.png,x", 'a 1.png,"open', "b 2.png,b", 'c.png,d" x', "e.png,e"],
        ["image,prompt", "0.png,x", 'a.png,"open', "b.png,b"],
        ["image,prompt", "0.png,x", 'a.png,"open', 'b.JPG,12"'],
        ["prompt,image", "x,0.png", '"open,a.png', "b,b.png", 'c" x,c.png'],
        ["image,prompt,note", "0.png,x,y", 'a.png,x,"open', 'b.png,b,"c"'],
        ["image,prompt", "http://h/0,x", 'http://h/1,"open', "http://h/2,b", 'http://h/3,c"'],
    ],
)
def test_a_quote_that_swallows_rows_is_an_error_that_names_the_row(
    tmp_path: Path, lines: list[str]
) -> None:
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"row 2 has another row inside its .*\n  close the"):
        read(tmp_path / "t.csv")


@pytest.mark.parametrize(
    "text",
    ["a dog\nsitting, asleep", "1girl,solo\nsmile,hat", "a,\nhttp://h/a, by b", "as in\ndog.png"],
)
def test_a_caption_of_several_lines_is_no_swallowed_row(tmp_path: Path, text: str) -> None:
    rows = [{"image": "a.png", "prompt": text}, {"image": "b.png", "prompt": "x"}]
    table, said = read(write(tmp_path, "csv", rows))
    assert captions(table) == {"a.png": [text], "b.png": ["x"]}
    assert said == ""


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
def test_a_size_is_read_from_text_and_left_unknown_where_it_is_none(
    tmp_path: Path, ending: str
) -> None:
    widths = ["512", " 30.5 ", "wide", None]
    rows = [{"image": f"{n}", "prompt": "x", "width": each} for n, each in enumerate(widths)]
    table, _ = read(write(tmp_path, ending, rows))
    assert str(table.sizes[:, 0].tolist()) == "[512.0, 30.5, nan, nan]"
    path = write(tmp_path, "json", [{"image": "a", "prompt": "x", "width": [True]}])
    assert str(read(path)[0].sizes[0].tolist()) == "[nan, nan]"


SIGNED = "https://h/a.png?sig=SECRET&b=1"


def test_what_is_said_of_a_table_has_no_passwords_and_no_signed_queries(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    wrong = {
        f"{SIGNED},b,c": "Expected 2 columns, got 3: https://h/a.png?…",
        f'x,"open\n{SIGNED},b': "row 1 has another row inside its prompt: https://h/a.png?…",
        "https://me:SECRET@h/a.png,b": "the address in row 1 begins with a name or password",
        "https://me:SECRET@h/a.png,b,c": "Expected 2 columns, got 3: https://h/a.png,b,c",
    }
    for line, says in wrong.items():
        path.write_text(f"image,prompt\n{line}\n")
        with pytest.raises(DataError) as caught:
            read(path)
        assert says in str(caught.value)
        assert "SECRET" not in str(caught.value)

    nested = tmp_path / "t.json"
    nested.write_text(json.dumps([{"image": {"url": f"https://me:{'SECRET' * 20}@h/a.png"}}]))
    with pytest.raises(DataError) as caught:
        read(nested)
    assert "row 1: image cannot be {" in str(caught.value)
    assert "SECRET" not in str(caught.value)

    path.write_text(f"image,prompt,width,height\n{SIGNED},a,1,1\n{SIGNED},b,1,1\n")
    table, said = read(path)
    heard = Heard()
    bus = Bus([heard])
    table.tell_other_sizes(pa.table({"path": [SIGNED], "width": [2], "height": [2]}), bus)
    bus.close()
    said += "".join(event.text for event in heard.events if isinstance(event, Notice))
    assert said.count("such as https://h/a.png?…") == 2
    assert "SECRET" not in said


def test_a_parquet_table_with_the_pictures_inside_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [{"bytes": b"x"}], "prompt": ["x"]}), path)
    with pytest.raises(DataError, match="holds struct<bytes: binary> where text is expected"):
        read(path)


def test_files_find_their_rows_by_path_by_stem_and_by_name(tmp_path: Path) -> None:
    names = ["a/b.png", "c", "sub\\d.png", "e.png", "u\u0308.png"]
    path = write(tmp_path, "csv", [{"image": name, "prompt": name} for name in names])
    keys = pa.array(["a/b.png", "b.png", "c.png", "x/c.jpg", "sub/d.png", "x/e.png", "ü.png"])

    def found(**rest: bool) -> list[str | None]:
        table, _ = read(path, **rest)
        return [row if row < 0 else table.files[row].as_py() for row in table.rows_of(keys)]

    exact = ["a/b.png", -1, -1, -1, "sub\\d.png", -1, "ü.png"]
    assert found() == exact
    assert found(endings=False) == [*exact[:2], "c", *exact[3:]]
    assert found(anywhere=True) == [*exact[:5], "e.png", exact[6]]
    both = found(endings=False, anywhere=True)
    assert both == ["a/b.png", -1, "c", "c", "sub\\d.png", "e.png", "ü.png"]


def test_members_are_what_is_named_and_the_rest_of_the_folder_is_told(tmp_path: Path) -> None:
    names = ["a.png", "http://h/x.png", "gone.png"]
    table, _ = read(write(tmp_path, "csv", [{"image": n, "prompt": "p"} for n in names]))
    members = table.members(["a.png", "b.png", "caf\udce9.png"])
    assert sorted(members.names) == sorted(names)
    assert members.unlisted == ["b.png", "caf\udce9.png"]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_million_rows_are_read_and_matched_in_seconds(tmp_path: Path, ending: str) -> None:
    count = 1_000_000
    names = [f"folder/{number:07}.png" for number in range(count)]
    path = tmp_path / f"t.{ending}"
    if ending == "parquet":
        prompts = [[f"a picture of {n}", "again"] for n in range(count)]
        pq.write_table(pa.table({"image": names, "prompt": prompts}), path)
    elif ending == "csv":
        lines = (f'{name},"a picture, of {name}"\n' for name in names)
        path.write_text("image,prompt\n" + "".join(lines))
    else:
        path.write_text(
            "".join(f'{{"image": "{name}", "prompt": "of {name}"}}\n' for name in names)
        )
    start = time.process_time()
    table, _ = read(path)
    members = table.members(names)
    told = table.captions_of(pa.array(names))
    assert time.process_time() - start < 20  # of both cores
    assert len(members.names) == len(told) == count
    assert told.null_count == 0


def test_what_is_said_of_pictures_has_no_signed_queries() -> None:
    address = "https://host/a.png?X-Amz-Signature=abc"
    assert Excluded("the server said 403", 1, address).example == "https://host/a.png?…"
    assert listed({address: "the server said 403"}) == "  https://host/a.png?…: the server said 403"
    assert listed({"a/b.png": "empty"}) == "  a/b.png: empty"


@pytest.mark.parametrize("name", ["../a.png", "b/../../a.png", "..\\a.png"])
def test_a_row_that_leads_out_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    rows = [{"image": "in..side.png", "prompt": "a"}, {"image": name, "prompt": "b"}]
    with pytest.raises(DataError, match=r"row 2 names .* does not lie in the dataset's folder"):
        read(write(tmp_path, "csv", rows))


def test_an_address_may_have_dots_in_it(tmp_path: Path) -> None:
    address = "https://example.com/a/../b.png"
    found, _ = read(write(tmp_path, "csv", [{"image": address, "prompt": "a"}]))
    assert captions(found) == {address: ["a"]}
