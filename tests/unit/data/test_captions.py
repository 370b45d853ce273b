from __future__ import annotations

import pytest

from simpletuner.core.errors import ConfigError
from simpletuner.data.caption_edits import CaptionFilter, TagShuffle, Trigger
from simpletuner.data.captions import CAPTION_STRATEGIES, CaptionRule, decode_text, text_key


def captions(strategy: str, path: str = "a/b.png", text: str | None = None, **rest: object):
    return CaptionRule(CAPTION_STRATEGIES[strategy], **rest).captions(path, text)


@pytest.mark.parametrize(
    ("path", "caption"),
    [
        ("dogs/a_red_dog.jpg", "a red dog"),
        ("a.b, c-d.png", "a.b, c-d"),
        ("_edge_.png", "edge"),
        ("http://[no address/a_cat.png?x=1", "a cat"),
        ("https://example.com/x/a_red%20dog.jpg?signature=a.b/y_z", "a red dog"),
        ("cafe\u0301.png", "caf\u00e9"),
    ],
)
def test_a_file_name_becomes_a_caption(path: str, caption: str) -> None:
    assert captions("filename", path) == (caption,)


def test_lines_of_a_text_are_alternatives_unless_turned_off() -> None:
    text = "one dog\n\n  two dogs \none dog"
    assert captions("textfile", text=text) == ("one dog", "two dogs")
    assert captions("textfile", text=text, multiline=False) == (text,)


def test_an_empty_text_is_the_empty_caption() -> None:
    assert captions("textfile", text="") == ("",)


def test_instance_prompts_are_alternatives_for_every_picture() -> None:
    assert captions("instanceprompt", prompts=("sks dog", "a dog")) == ("sks dog", "a dog")


def test_a_prepended_prompt_stands_before_every_caption() -> None:
    rule = {"prompts": ("sks", "zwx"), "prepend": True}
    assert captions("textfile", text="cat\ndog", **rule) == (
        "sks cat",
        "sks dog",
        "zwx cat",
        "zwx dog",
    )
    assert captions("textfile", text="", prompts=("sks",), prepend=True) == ("sks",)


def test_a_strategy_that_is_not_built_says_so() -> None:
    with pytest.raises(ConfigError, match="webshart is not built yet"):
        captions("webshart")


@pytest.mark.parametrize(
    ("data", "text", "encoding"),
    [
        (b"plain", "plain", "utf-8"),
        ("caf\u00e9".encode(), "caf\u00e9", "utf-8"),
        (b"\xef\xbb\xbfmark", "mark", "utf-8-sig"),
        ("caf\u00e9".encode("cp1252"), "caf\u00e9", "cp1252"),
        (b"\x93quoted\x94", "\u201cquoted\u201d", "cp1252"),
        ("caf\u00e9".encode("utf-16"), "caf\u00e9", "utf-16"),
        (b"  one\r\ntwo\rthree \r\n", "one\ntwo\nthree", "utf-8"),
        ("cafe\u0301".encode(), "caf\u00e9", "utf-8"),
        (b"", "", "utf-8"),
    ],
)
def test_bytes_become_clean_text(data: bytes, text: str, encoding: str) -> None:
    assert decode_text(data) == (text, encoding)


def test_bytes_that_are_no_text_are_no_caption() -> None:
    assert decode_text(b"\x81\x8d\xff") is None


def test_the_text_file_lies_beside_the_picture() -> None:
    assert text_key("a/b.c.JPG") == "a/b.c.txt"


def test_edits_come_one_after_the_other() -> None:
    made = captions(
        "textfile",
        text="a ugly, b\nugly",
        filters=(CaptionFilter.of("ugly ?"),),
        shuffle=TagShuffle(count=20, seed=0, original=False),
        prompts=("sks",),
        prepend=True,
        prefix="photo of [trigger],",
        suffix=".",
        trigger=Trigger("zwx", prepend=True),
    )
    assert set(made) == {"photo of zwx, sks a, b.", "photo of zwx, sks b, a."}


def test_a_caption_that_filters_leave_nothing_of_is_the_empty_one() -> None:
    gone = (CaptionFilter.of(".*"),)
    assert captions("textfile", text="one\ntwo", filters=gone) == ("",)


def test_the_default_stands_for_a_text_that_is_missing_not_for_an_empty_one() -> None:
    assert captions("textfile", text=None, default="a cat\na dog") == ("a cat", "a dog")
    assert captions("textfile", text="", default="a cat") == ("",)


def test_utf16_without_a_mark_is_no_caption() -> None:
    assert decode_text("a red cat".encode("utf-16-le")) is None


def test_what_nobody_sees_is_no_caption() -> None:
    assert decode_text(" \u200b\ufeff \n".encode()) == ("", "utf-8")
    assert decode_text("\ufeff\ufeffa cat\u200b".encode()) == ("a cat", "utf-8-sig")
