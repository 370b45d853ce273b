from __future__ import annotations

import pytest

from simpletuner.config.flat import SETTINGS, build_section, by_name, canonical, flatten
from simpletuner.config.root import Config
from simpletuner.config.source import Given
from simpletuner.config.unsupported import UNSUPPORTED
from simpletuner.config.variables import ENVIRONMENT_NAMES
from simpletuner.core.errors import Problem
from simpletuner.core.section import Section, setting


class Small(Section):
    """A section of a test."""

    rank: int = setting(16, ge=1)
    """A number."""

    rate: float = setting()
    """A number that is required."""


@pytest.mark.parametrize(
    "spelling",
    [
        "gradient_checkpointing",
        "--gradient_checkpointing",
        "-gradient-checkpointing",
        "GRADIENT_CHECKPOINTING",
        "Gradient-Checkpointing",
        "use_gradient_checkpointing",
        "--USE-gradient_checkpointing",
    ],
)
def test_a_key_has_one_name_however_it_is_spelled(spelling: str) -> None:
    assert canonical(spelling) == "gradient_checkpointing"


@pytest.mark.parametrize("variable", ENVIRONMENT_NAMES)
def test_every_listed_variable_stands_for_a_setting(variable: str) -> None:
    name = canonical(variable)

    assert name in SETTINGS or name in UNSUPPORTED


def test_the_same_key_twice_names_both_lines() -> None:
    problems: list[Problem] = []
    given = [
        Given("lora_rank", 4, "config.json", 2),
        Given("--LORA-rank", 8, "config.json", 9),
        Given("validation_steps", 10, "config.json", 3),
        Given("validation_step_interval", 20, "config.json", 4),
    ]

    named = by_name(given, SETTINGS, problems)

    assert named["lora_rank"].value == 4
    assert [(p.line, p.key, p.message) for p in problems] == [
        (9, "--LORA-rank", "is already set on line 2 as lora_rank; keep one of the two"),
        (
            4,
            "validation_step_interval",
            "is already set on line 3 as validation_steps; keep one of the two",
        ),
    ]


def test_an_unknown_key_names_the_nearest_and_an_unsupported_one_says_what_to_do() -> None:
    problems: list[Problem] = []
    given = [Given("lerning_rate", 1), Given("crepa_enabled", True), Given("hf_token", "x")]

    by_name(given, SETTINGS, problems)

    assert problems[0].message == "unknown setting; did you mean learning_rate?"
    assert problems[1].message == UNSUPPORTED["crepa_enabled"]
    assert "secret" in problems[2].message


def test_an_unsupported_setting_that_asks_for_nothing_is_passed_over() -> None:
    problems: list[Problem] = []

    assert by_name([Given("crepa_enabled", False), Given("$schema", "x")], SETTINGS, problems) == {}
    assert problems == []


def test_a_section_says_everything_that_is_wrong_at_once() -> None:
    values = {"rank": True}
    given = {"rank": Given("--rank", True, "config.json", 7)}

    built, problems = build_section(Small, values, given)

    assert built is None
    assert {(p.key, p.line, p.message) for p in problems} == {
        ("--rank", 7, "must be a whole number, got true"),
        ("rate", None, "is required"),
    }


def test_a_section_is_built_from_what_can_be_used() -> None:
    given = {"rank": Given("rank", 0), "rate": Given("rate", 0.5)}

    built, problems = build_section(Small, {"rank": 0, "rate": 0.5}, given)

    assert built == Small(rank=16, rate=0.5)
    assert [p.message for p in problems] == ["must be at least 1, got 0"]


def test_flattening_gives_every_key_once() -> None:
    flat = flatten(Config.model_validate({"model": {"model_family": "sdxl"}}))

    assert flat.keys() == SETTINGS.keys()
    assert flat["model_family"] == "sdxl"
