from __future__ import annotations

import pytest

from simpletuner.config.toml_lines import parse_toml
from simpletuner.core.errors import ConfigError


def test_every_top_level_key_has_its_line() -> None:
    text = """\
# settings
model_family = "sdxl"
"--lora_rank" = 8
lists = [
  1,
]
[optimizer_config]
lora_rank = 1
betas = [0.9, 0.99]
"""

    assert parse_toml(text, "") == [
        ("model_family", "sdxl", 2),
        ("--lora_rank", 8, 3),
        ("lists", [1], 4),
        ("optimizer_config", {"lora_rank": 1, "betas": [0.9, 0.99]}, 7),
    ]


def test_what_is_no_toml_is_named_with_its_line() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_toml("a = 1\nb = lora\n", "config.toml")

    (problem,) = caught.value.problems
    assert (problem.file, problem.line) == ("config.toml", 2)
    assert problem.message.startswith("is not TOML: ")
