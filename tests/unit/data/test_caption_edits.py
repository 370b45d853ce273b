"""Filters, tag shuffles and trigger words, each by what it does to one caption."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import pytest

from simpletuner.data.caption_edits import CaptionFilter, TagShuffle, Trigger, surrounded


@pytest.mark.parametrize(
    ("entry", "before", "after"),
    [
        ("arafed ", "arafed man, arafed cat", "man, cat"),
        ("this .* has a", "see, this big cat has a hat", "see,  hat"),
        ("^a photo of ", "a photo of a photo of me", "a photo of me"),
        (r"\(masterpiece\)", "cat (masterpiece), masterpiece", "cat , masterpiece"),
        ("(?i)cat", "Cat CAT dog", "  dog"),
        ("s/this/that/", "this this", "that this"),
        ("s/this/that", "this this", "that this"),
        ("s/this/that/g", "this this", "that that"),
        ("s/this//", "this this", " this"),
        (r"s/(\w+) and (\w+)/\2 and \1/", "cat and dog", "dog and cat"),
        (r"s/1\/2/a\/b/", "1/2 cup", "a/b cup"),
        ("w/o", "a cat w/o hat", "a cat  hat"),
    ],
)
def test_a_filter_does_what_its_form_says(entry: str, before: str, after: str) -> None:
    assert CaptionFilter.of(entry)(before) == after


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (":(", r"':\(' is not a regular expression: .*takes it as it stands"),
        ("s/[/x/", r"'\[' is not a regular expression"),
        ("s/only", "'s/only' is not of the form s/search/replace/"),
        ("s//x/", "'s//x/' is not of the form"),
        (r"s/(a)/\2/", r"cannot replace: invalid group reference 2"),
        (r"s/a/\g<x>/", "cannot replace: unknown group name 'x'"),
    ],
)
def test_a_filter_that_is_none_says_why(entry: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        CaptionFilter.of(entry)


def test_a_shuffle_keeps_the_tags_and_those_at_the_start() -> None:
    caption = "sks, " + ", ".join("abcdefgh")
    original, *others = TagShuffle(count=3, seed=1, keep=1)(caption)
    assert original == caption
    assert len(set(others)) == 3
    for other in others:
        assert other.startswith("sks, ")
        assert sorted(other.split(", ")) == sorted(caption.split(", "))


def test_shuffles_follow_from_seed_and_caption_and_the_first_ones_stay() -> None:
    caption = ", ".join("abcdefgh")

    def drawn(count: int, seed: int) -> list[str]:
        return list(TagShuffle(count=count, seed=seed, original=False)(caption))

    assert drawn(2, 7) == drawn(4, 7)[:2], "a larger count encodes only what is new"
    assert drawn(4, 7) != drawn(4, 8)


def test_every_order_is_as_frequent_as_every_other() -> None:
    seen = Counter(TagShuffle(count=3000, seed=0, original=False)("a, b, c"))
    assert set(seen) == {", ".join(order) for order in permutations("abc")}
    assert all(430 < count < 570 for count in seen.values())


@pytest.mark.parametrize(
    ("split_on", "caption", "orders"),
    [
        ("comma", "a b,c d", {"c d, a b", "a b, c d"}),
        ("space", "a,  b", {"a, b", "b a,"}),
        ("period", "It is 1.5 m. A cat.", {"It is 1.5 m. A cat.", "A cat. It is 1.5 m."}),
        ("period", "One. Two", {"One. Two", "Two. One"}),
    ],
)
def test_tags_are_joined_as_they_were_split(split_on: str, caption: str, orders: set[str]) -> None:
    shuffle = TagShuffle(count=20, seed=0, split_on=split_on, original=False)
    assert set(shuffle(caption)) == orders


@pytest.mark.parametrize("caption", ["", "one", "kept,  one", "kept, "])
def test_with_less_than_two_tags_to_move_the_caption_stays(caption: str) -> None:
    assert list(TagShuffle(count=3, seed=0, keep=1, original=False)(caption)) == [caption]


@pytest.mark.parametrize(
    ("caption", "filled", "prepended"),
    [
        ("a [trigger] cat, [trigger]", "a zwx man cat, zwx man", "a zwx man cat, zwx man"),
        ("a zwx man", "a zwx man", "a zwx man"),
        ("a zwx manor", "a zwx manor", "zwx man a zwx manor"),
        ("", "", "zwx man"),
    ],
)
def test_a_trigger_takes_its_place_or_stands_before(
    caption: str, filled: str, prepended: str
) -> None:
    assert Trigger("zwx man")(caption) == filled
    assert Trigger("zwx man", prepend=True)(caption) == prepended


def test_prefix_and_suffix_stand_apart_by_one_blank_or_a_mark() -> None:
    assert surrounded("photo,", "a cat", "at night") == "photo, a cat at night"
    assert surrounded("", "a cat", ", at night") == "a cat, at night"
    assert surrounded("photo", "", "") == "photo"
    assert surrounded("", "", "at night") == "at night"
