"""What a datasets file says of captions: filters from a list or a file, shuffles, trigger words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.config.workplace import PICTURES, Workplace

TEXTS = {"id": "texts", "dataset_type": "text_embeds"}


def filters(place: Workplace, **entry: Any) -> list[tuple[str, ...] | None]:
    own = {**PICTURES, "id": "own", "caption_filter_list": ["mine"]}
    place.datasets("", PICTURES, own, {**TEXTS, **entry})
    return [each.caption_filter_list for each in place.load().datasets.training]


def test_filters_of_the_text_embeds_entry_hold_where_a_dataset_has_none(place: Workplace) -> None:
    assert filters(place, caption_filter_list=["a", "s/b/c/"]) == [("a", "s/b/c/"), ("mine",)]
    assert filters(place) == [None, ("mine",)]


def test_filters_are_read_from_a_file_with_the_blanks_at_their_ends(place: Workplace) -> None:
    (place.root / "f.txt").write_bytes("\ufeffarafed \r\n\r\n^this\n".encode())
    (place.root / "f.json").write_text(json.dumps(["arafed ", "^this"]))
    for name in ("f.txt", "f.json"):
        assert filters(place, caption_filter_list=name)[0] == ("arafed ", "^this")


@pytest.mark.parametrize(
    ("name", "text", "file", "line", "message"),
    [
        ("f.txt", "fine\n[", "f.txt", 2, "'[' is not a regular expression"),
        ("f.json", '["fine", "s/x"]', "f.json", None, "entry 2: 's/x' is not of the form"),
        ("f.json", "{}", "config/multidatabackend.json", 10, "f.json is not a JSON list of texts"),
        ("other.txt", "", "config/multidatabackend.json", 10, "f.txt does not exist"),
    ],
)
def test_a_filter_file_that_cannot_be_used_is_named_with_its_line(
    place: Workplace, name: str, text: str, file: str, line: int | None, message: str
) -> None:
    place.write(name, text)
    filters = "f.txt" if name == "other.txt" else name
    place.datasets("", PICTURES, {**TEXTS, "caption_filter_list": filters})
    (found,) = place.problems()
    assert (found.file, found.line) == (file, line)
    assert found.message.startswith(message)


def test_a_filter_of_a_list_is_named_by_its_number(place: Workplace) -> None:
    place.datasets("", PICTURES, {**TEXTS, "caption_filter_list": ["fine", "*"]})
    (message,) = place.messages()
    assert message.startswith("caption_filter_list: entry 2: '*' is not a regular expression")


def test_a_shuffle_takes_the_seed_of_the_run_unless_it_has_one(place: Workplace) -> None:
    place.config(seed=7)
    own = {**PICTURES, "id": "own", "caption_shuffle": {"enable": True, "seed": 3}}
    place.datasets("", {**PICTURES, "caption_shuffle": {"enable": True, "count": 2}}, own)
    shuffles = [each.caption_shuffle for each in place.load().datasets.training]
    assert [(each.seed, each.count) for each in shuffles if each] == [(7, 2), (3, 1)]


def test_slips_inside_a_shuffle_are_named(place: Workplace) -> None:
    shuffle = {"enabel": True, "count": 0, "split_on": "coma"}
    place.datasets("", {**PICTURES, "caption_shuffle": shuffle})
    unknown, count, split_on = place.messages()
    assert unknown == (
        "caption_shuffle.enabel: caption_shuffle has no such option; did you mean enable?"
    )
    assert count == "caption_shuffle.count: must be at least 1, got 0"
    assert split_on.startswith("caption_shuffle.split_on: must be one of comma, space, period")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"caption_shuffle": {"count": 2}}, "caption_shuffle: changes nothing by itself; write"),
        ({"prepend_trigger_word": True}, "prepend_trigger_word: needs trigger_word"),
        ({"caption_prefix": "[trigger] x"}, "caption_prefix: holds [trigger]; set trigger_word"),
        ({"default_caption": "x"}, "default_caption: is read under caption_strategy textfile"),
    ],
)
def test_caption_keys_that_would_change_nothing_are_refused(
    place: Workplace, entry: dict[str, Any], message: str
) -> None:
    place.datasets("", {**PICTURES, **entry})
    (found,) = place.messages()
    assert found.startswith(message)


def test_a_trigger_word_may_be_said_once_for_all_datasets(place: Workplace) -> None:
    place.config(trigger_word="zwx")
    place.datasets("", PICTURES, {**PICTURES, "id": "b", "trigger_word": "qvy"})
    words = [each.trigger_word for each in place.load().datasets.training]
    assert words == ["zwx", "qvy"]
