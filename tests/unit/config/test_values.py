from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from simpletuner.config.source import Given
from simpletuner.config.values import kind_of, read_value


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "a whole number"),
        (float | None, "a number"),
        (bool, "true or false"),
        (Path, "text"),
        (Literal["a", "b"], "one of a, b"),
        (tuple[str, ...] | None, "a list of text"),
        (tuple[tuple[int, int], ...], "a list of lists of whole numbers"),
        (dict[str, Any] | None, "an object"),
        (int | str, "a whole number or text"),
        (Any, "any value"),
    ],
)
def test_a_type_reads_in_words(annotation: Any, words: str) -> None:
    assert kind_of(annotation).words == words


@pytest.mark.parametrize(
    ("annotation", "written", "value"),
    [
        (float, "1e-4", 1e-4),
        (int, " 16 ", 16),
        (bool, "False", False),
        (bool, "yes", True),
        (tuple[int, ...], "[7, 8, 9]", [7, 8, 9]),
        (tuple[int, ...], "7,8,9", [7, 8, 9]),
        (tuple[str, ...] | None, "to_k, to_q", ["to_k", "to_q"]),
        (dict[str, Any], '{"a": 1}', {"a": 1}),
    ],
)
def test_text_is_read_as_what_the_setting_takes_and_noted(
    annotation: Any, written: str, value: object
) -> None:
    given = Given("key", written, "config.json", 3)

    read, note = read_value(given, kind_of(annotation))

    assert read == value
    assert note.startswith("config.json line 3: key ")


@pytest.mark.parametrize(
    ("annotation", "written"),
    [
        (Literal["bf16", "no"], "no"),
        (str, "true"),
        (str, "16"),
        (str | tuple[str, ...], "[a] photo, of b"),
        (int, "many"),
    ],
)
def test_text_stays_text_where_that_is_meant(annotation: Any, written: str) -> None:
    assert read_value(Given("key", written), kind_of(annotation)) == (written, "")


def test_flags_are_text_by_nature_and_not_noted() -> None:
    assert read_value(Given("key", "16", text=True), kind_of(int)) == (16, "")
