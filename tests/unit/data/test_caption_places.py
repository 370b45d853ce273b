"""Captions of a dataset: where their files are found, and what of their settings counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.making import opened, picture, told


@pytest.mark.parametrize("text", ["cafe\u0301.txt", "caf\u00e9.TXT", "cafe\u0301.TXT"])
def test_a_text_is_found_however_its_accents_and_its_ending_are_written(
    text: str, tmp_path: Path
) -> None:
    picture(tmp_path / "data", "caf\u00e9.png")
    (tmp_path / "data" / text).write_text("a table", encoding="utf-8")
    for _ in range(2):  # and again when its index knows it
        source = opened(tmp_path / "data", caption_strategy="textfile")
        assert source.captions(0) == ("a table",)


def test_a_trigger_word_that_stands_in_no_caption_is_told(tmp_path: Path) -> None:
    picture(tmp_path / "data", "cat.png", caption="a cat")

    def warned(**rest: Any) -> bool:
        said = told(tmp_path / "data", caption_strategy="textfile", trigger_word="zwx", **rest)[1]
        return "no caption holds the trigger_word zwx" in said

    assert warned()
    assert warned(instance_prompt="a zwx")  # which is used nowhere
    assert not warned(instance_prompt="a zwx", prepend_instance_prompt=True)
    assert warned(instance_prompt="a cat", only_instance_prompt=True)
    assert not warned(prepend_trigger_word=True)
    assert not warned(caption_prefix="a photo of [trigger]")
    picture(tmp_path / "data", "dog.png", caption="a [trigger]")
    assert not warned()


def test_a_caption_setting_without_effect_is_no_other_data(tmp_path: Path) -> None:
    picture(tmp_path / "data", "cat.png", caption="a cat")

    def digest(**rest: Any) -> str:
        return opened(tmp_path / "data", caption_strategy="textfile", **rest).caption_digest()

    same = {digest(), digest(instance_prompt="sks"), digest(default_caption="thing")}
    assert len(same) == 1
    assert digest(instance_prompt="sks", prepend_instance_prompt=True) not in same
