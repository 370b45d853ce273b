from __future__ import annotations

import pytest

from simpletuner.config.flags import split_flags
from simpletuner.core.errors import ConfigError


def is_switch(key: str) -> bool:
    return key.lstrip("-") == "switch"


def pairs(*words: str) -> list[tuple[str, str | bool]]:
    return [(flag.key, flag.value) for flag in split_flags(words, is_switch)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--lora_rank", "4"), ("--lora_rank", "4")),
        (("--lora_rank=4",), ("--lora_rank", "4")),
        (("lora_rank=4",), ("lora_rank", "4")),
        (("--switch",), ("--switch", True)),
        (("--switch", "true"), ("--switch", "true")),
        (("--switch=false",), ("--switch", "false")),
        (("--prompt", "a = b"), ("--prompt", "a = b")),
        (("prompt=a=b\nc",), ("prompt", "a=b\nc")),
        (("--offset", "-0.5"), ("--offset", "-0.5")),
        (("--prompt=",), ("--prompt", "")),
    ],
)
def test_a_setting_is_written_in_several_ways(
    words: tuple[str, ...], expected: tuple[str, str | bool]
) -> None:
    assert pairs(*words) == [expected]


def test_a_switch_leaves_the_next_setting_alone() -> None:
    assert pairs("--switch", "rank=4", "--switch", "--rank", "8") == [
        ("--switch", True),
        ("rank", "4"),
        ("--switch", True),
        ("--rank", "8"),
    ]


def test_stray_words_and_missing_values_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        pairs("stray", "--rank", "--seed", "1", "--last")

    assert [(p.key, p.message) for p in caught.value.problems] == [
        ("stray", "is not a setting; write --key value or key=value"),
        ("--rank", "needs a value: --key value or --key=value"),
        ("--last", "needs a value: --key value or --key=value"),
    ]
