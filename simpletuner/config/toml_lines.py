"""TOML with the line of every top-level key."""

from __future__ import annotations

import re
import tomllib
from typing import Any

from simpletuner.core.errors import ConfigError, Problem

_KEY = re.compile(r"""\s*(?:"([^"]+)"|'([^']+)'|([A-Za-z0-9_-]+))\s*(?:=|\.)""")
_TABLE = re.compile(r"""\s*\[\[?\s*["']?([A-Za-z0-9_-]+)""")
_PLACE = re.compile(r"^(?P<message>.*) \(at (?:line (?P<line>\d+), column \d+|end of document)\)$")


def parse_toml(text: str, file: str) -> list[tuple[str, Any, int]]:
    """The top-level keys of `text`: name, plain value, line.

    Raises:
        ConfigError: It is not TOML.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(problems=[_problem(error, text, file)]) from None
    lines = _key_lines(text)
    return [(key, _plain(value), lines.get(key, 1)) for key, value in values.items()]


def _problem(error: tomllib.TOMLDecodeError, text: str, file: str) -> Problem:
    match = _PLACE.match(str(error))
    if match is None:
        return Problem(f"is not TOML: {error}", file=file)
    line = int(match["line"]) if match["line"] else text.count("\n") + 1
    message = match["message"][:1].lower() + match["message"][1:]
    return Problem(f"is not TOML: {message}; text takes quotes, one key a line", "", file, line)


def _key_lines(text: str) -> dict[str, int]:
    """Where each top-level key or table first stands; inside tables keys are not top-level."""
    lines: dict[str, int] = {}
    inside_table = False
    for number, line in enumerate(text.splitlines(), start=1):
        if table := _TABLE.match(line):
            # A line that starts with a bracket may also be the middle of a list; that one is
            # never a key of the file, so its entry is never looked up.
            inside_table = "=" not in line
            lines.setdefault(table[1], number)
        elif not inside_table and (key := _KEY.match(line)):
            lines.setdefault(next(name for name in key.groups() if name), number)
    return lines


def _plain(value: Any) -> Any:
    """`value` with dates, which no setting takes, as text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) else str(value)
