from __future__ import annotations

import pyarrow as pa

from simpletuner.data.pairing import pair


def column(*paths: str) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(paths, pa.string())])


def test_a_file_belongs_to_the_picture_of_its_path_whatever_the_ending() -> None:
    pictures = column("a.jpg", "b.v2.png", "deep/a.jpg", "ü b.webp", "none.png")
    others = column("deep/a.png", "ü b.png", "b.v2.PNG", "a.png", "b.v1.png")

    found = pair(pictures, others)

    assert found.rows.tolist() == [3, 2, 0, 1, -1]
    assert not found.several.any()
    assert found.alone.to_pylist() == ["b.v1.png"]


def test_a_folder_with_a_dot_is_no_ending() -> None:
    assert pair(column("v1.0/a"), column("v1.1/a", "v1.0/a.png")).rows.tolist() == [1]


def test_the_same_ending_comes_first_and_two_others_are_none() -> None:
    pictures = column("a.jpg", "a.png", "b.png", "c.jpg", "c.png")
    others = column("a.jpg", "a.png", "b.bmp", "b.tif", "c.bmp")

    found = pair(pictures, others)

    assert found.rows.tolist() == [0, 1, -1, 4, 4]
    assert found.several.tolist() == [False, False, True, False, False]
    assert found.alone.to_pylist() == []


def test_a_file_of_exactly_one_pictures_path_is_no_other_pictures() -> None:
    pictures = column("a.jpg", "a.png", "b.jpg", "b.png")
    others = column("a.png", "b.bmp", "b.png")

    found = pair(pictures, others)

    assert found.rows.tolist() == [-1, 0, 1, 2]
    assert not found.several.any()
    assert found.alone.to_pylist() == []


def test_nothing_pairs_with_nothing() -> None:
    assert pair(column("a.png"), column()).rows.tolist() == [-1]
    assert pair(column(), column("a.png")).alone.to_pylist() == ["a.png"]


def test_a_second_file_of_a_picture_that_has_its_own_is_left_over() -> None:
    found = pair(column("a.png"), column("a.jpg", "a.png"))

    assert found.rows.tolist() == [1]
    assert found.alone.to_pylist() == ["a.jpg"]


def test_accents_that_are_written_in_two_ways_are_the_same() -> None:
    pictures = column("caf\u00e9.png", "bare.png")
    others = column("cafe\u0301.jpg", "other.png")

    found = pair(pictures, others)

    assert found.rows.tolist() == [0, -1]
    assert found.alone.to_pylist() == ["other.png"]
