"""Which prompts are rendered, and what a library may look like."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simpletuner.core.errors import ConfigError
from simpletuner.core.files import safe_name
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


@pytest.mark.parametrize(
    ("library", "named"),
    [
        ({"validation": "a"}, "validation"),
        ({"unconditional": "a"}, "unconditional"),
        ({"cat": "a", "Cat": "b"}, "Cat"),
        ({"UNCONDITIONAL": "a"}, "UNCONDITIONAL"),
    ],
)
def test_prompts_whose_pictures_would_share_a_name_are_refused(
    tmp_path: Path, library: dict[str, str], named: str
) -> None:
    settings = ValidationSettings(
        validation_prompt="x", user_prompt_library=write(tmp_path, library)
    )
    with pytest.raises(ConfigError, match=f"two prompts are called '{named}'") as error:
        Prompts.of(settings)
    assert "would overwrite each other" in error.value.message
    assert "rename it" in str(error.value.fix)


def test_names_that_no_file_can_have_are_told_apart(tmp_path: Path) -> None:
    library = write(tmp_path, {"a/b": "1", "a_b": "2", "A/B": "3", "": "4", "猫": "5", "犬": "6"})
    settings = ValidationSettings(user_prompt_library=library)
    entries = Prompts.of(settings).entries
    assert [entry.text for entry in entries] == ["", "1", "2", "3", "4", "5", "6"]
    assert len({safe_name(entry.name).lower() for entry in entries}) == 7


def test_a_name_is_free_where_the_runs_own_prompt_is_off(tmp_path: Path) -> None:
    settings = ValidationSettings(
        user_prompt_library=write(tmp_path, {"unconditional": "a", "validation": "b"}),
        validation_disable_unconditional=True,
    )
    assert [entry.text for entry in Prompts.of(settings).entries] == ["a", "b"]


def test_a_library_is_not_read_where_nothing_is_rendered(tmp_path: Path) -> None:
    settings = ValidationSettings(
        user_prompt_library=write(tmp_path, {"a": 3}), validation_disable=True
    )
    assert Prompts.of(settings).entries == ()


def test_a_reference_lies_beside_the_library(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    library = write(tmp_path, {"cat": {"prompt": "a cat", "reference": "cat.png"}, "dog": "a dog"})

    assert [each.reference for each in read_library(library)] == [tmp_path / "cat.png", None]
    assert [each.control for each in read_library(library)] == [None, None]


def test_a_control_picture_lies_beside_the_library_and_can_be_shown(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "edges.png")
    library = write(tmp_path, {"cat": {"prompt": "a cat", "control": "edges.png"}})
    assert [each.control for each in read_library(library)] == [tmp_path / "edges.png"]

    (tmp_path / "edges.png").write_bytes(b"")
    with pytest.raises(ConfigError, match="the control of 'cat' cannot be shown"):
        read_library(library)


def encoded(format: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(file := BytesIO(), format)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"),
        (b"", "cannot identify image file"),
        (encoded("PNG")[:-500], "truncated"),
        (encoded("JPEG")[:-500], "truncated"),
        (encoded("PNG").replace(b"IDAT", b"IDAU"), ""),
    ],
    ids=["nothing", "no picture", "half a PNG", "half a JPEG", "a broken PNG"],
)
def test_a_reference_that_cannot_be_shown_is_refused(
    tmp_path: Path, content: bytes | None, why: str
) -> None:
    if content is not None:
        (tmp_path / "cat.png").write_bytes(content)
    library = write(tmp_path, {"cat": {"prompt": "a cat", "reference": "cat.png"}})

    with pytest.raises(ConfigError, match=f"the reference of 'cat' cannot be shown: .*{why}") as it:
        read_library(library)
    assert "from the library's folder" in str(it.value.fix)


def test_a_reference_of_too_many_pixels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    library = write(tmp_path, {"cat": {"prompt": "a cat", "reference": "cat.png"}})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)

    with pytest.raises(ConfigError, match=r"cannot be shown: Image size .64 pixels. exceeds"):
        read_library(library)
