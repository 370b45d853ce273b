"""Which prompts are rendered, and what a library may look like."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.core.errors import ConfigError
from simpletuner.validation.prompts import Prompt, Prompts, read_library
from simpletuner.validation.settings import ValidationSettings


def write(folder: Path, value: object) -> Path:
    path = folder / "library.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_prompts_come_in_order_and_every_text_is_cached_once(tmp_path: Path) -> None:
    library = write(tmp_path, {"cat": "a cat", "dog": {"prompt": "a dog"}})
    settings = ValidationSettings(
        validation_prompt="a cat",
        user_prompt_library=library,
        validation_negative_prompt="ugly",
    )
    prompts = Prompts.of(settings)
    assert [entry.name for entry in prompts.entries] == [
        "unconditional",
        "cat",
        "dog",
        "validation",
    ]
    assert prompts.captions() == ["", "a cat", "a dog", "ugly"]


def test_the_unconditional_picture_and_all_of_validation_can_be_turned_off() -> None:
    only = ValidationSettings(validation_prompt="x", validation_disable_unconditional=True)
    assert Prompts.of(only).entries == (Prompt("validation", "x"),)
    off = ValidationSettings(validation_prompt="x", validation_disable=True)
    assert Prompts.of(off).entries == ()
    assert Prompts.of(off).captions() == []


def test_a_library_that_cannot_be_read_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cp config/user_prompt_library\.json\.example"):
        read_library(tmp_path / "nowhere.json")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_library(write(tmp_path, "{"))
    with pytest.raises(ConfigError, match="one object of name"):
        read_library(write(tmp_path, ["a"]))
    with pytest.raises(ConfigError, match="'a' needs a text"):
        read_library(write(tmp_path, {"a": 3}))
