from __future__ import annotations

import json

import pytest

from simpletuner.config.json_lines import JsonObject, inner_lines, parse_json, plain, repeated
from simpletuner.core.errors import ConfigError


def fault(text: str) -> tuple[int | None, str]:
    with pytest.raises(ConfigError) as caught:
        parse_json(text, "file.json")
    (problem,) = caught.value.problems
    assert problem.file == "file.json"
    return problem.line, problem.message


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1, -2.5, 1e-4, "\\u00e9\\n", true, false, null], "b": {}, "c": []}',
        " [ ] ",
        '"text"',
        "-0",
        '{"a": {"b": [{"c": 1}]}}',
        "123456789012345678901234567890",
    ],
)
def test_values_are_those_of_the_standard_library(text: str) -> None:
    assert plain(parse_json(text, "")) == json.loads(text)


def test_every_key_knows_its_line() -> None:
    value = parse_json('{"a": 1,\n\n "b": {\n"c": 2}}', "")

    assert isinstance(value, JsonObject)
    assert [(entry.key, entry.line) for entry in value.entries] == [("a", 1), ("b", 3)]
    assert inner_lines(value) == {("a",): 1, ("b",): 3, ("b", "c"): 4}


def test_a_key_written_twice_is_found_at_any_depth() -> None:
    value = parse_json('[{"a": 1,\n"x": {"b": 1,\n"b": 2}}, {"a": 1}]', "")

    assert [(first.line, second.line) for first, second in repeated(value)] == [(2, 3)]


def test_a_comma_before_the_end_is_named_with_its_line() -> None:
    line, message = fault('{\n "a": 1,\n}')

    assert line == 2
    assert message == "column 8: a comma stands before the closing }; remove the comma"


def test_a_missing_comma_is_named_where_it_is_missing() -> None:
    line, message = fault('{\n "a": 1\n "b": 2\n}')

    assert (line, message) == (
        2,
        "column 7: a comma or the closing } is missing after this value",
    )


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ('{"a": True}', "write true"),
        ('{"a": None}', "write null"),
        ("{'a': 1}", "text takes double quotes"),
        ('{"a": lora}', "text takes double quotes"),
        ("{a: 1}", "a name in double quotes is expected, found 'a'"),
        ('{"a": 1 // rank\n}', "JSON has no comments"),
        ('{# note\n"a": 1}', "JSON has no comments"),
        ('{"a" 1}', "a colon after the name is expected, found '1'"),
        ('{"a": "x}', "not closed; a double quote is missing"),
        ('{"a": "x\n"}', "not closed on its line"),
        ('{"a": "C:\\pictures"}', "a backslash in text is written twice"),
        ('{"a": NaN}', "NaN is not a JSON value"),
        ('{"a": 1', "the file ends before the closing }"),
        ('{"a": ', "a value is expected, the file ends here"),
        ('{"a": 1} }', "something follows"),
        ("  ", "is empty"),
        ("[1, -]", "a number is expected"),
        ("[" * 100_000, "too deep in each other"),
    ],
)
def test_what_is_no_json_is_said_in_plain_words(text: str, hint: str) -> None:
    assert hint in fault(text)[1]
