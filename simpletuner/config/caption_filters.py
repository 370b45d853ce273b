"""``caption_filter_list``: the entries it names, each of them checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from simpletuner.config.source import Given, read_text, shown
from simpletuner.core.errors import ConfigError, Problem
from simpletuner.data.caption_edits import CaptionFilter


def read_filters(
    value: Path | tuple[str, ...], given: Given, cwd: Path
) -> tuple[tuple[str, ...], list[Problem]]:
    """The entries of a list, or of the file it stands in, and what is wrong with them.

    Args:
        value: The list, or the file.
        given: Where it stands.
        cwd: What messages show files relative to.
    """
    if isinstance(value, tuple):
        wrong = _wrong(dict(enumerate(value, 1)))
        return value, [given.problem(f"entry {at}: {why}") for at, why in wrong]
    name = shown(value, cwd)
    if not value.is_file():
        return (), [given.problem(f"{name} does not exist; correct the path, or write a list")]
    try:
        text = read_text(value, name)
    except ConfigError as error:
        return (), list(error.problems)
    if value.suffix != ".json":
        # Blanks at the ends of a line count: "word " leaves no gap behind.
        lines = {at: line for at, line in enumerate(text.splitlines(), 1) if line.strip()}
        return tuple(lines.values()), [Problem(why, "", name, at) for at, why in _wrong(lines)]
    entries = _json_list(text)
    if entries is None:
        return (), [given.problem(f"{name} is not a JSON list of texts")]
    wrong = _wrong(dict(enumerate(entries, 1)))
    return tuple(entries), [Problem(f"entry {at}: {why}", file=name) for at, why in wrong]


def _json_list(text: str) -> list[str] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    sound = isinstance(found, list) and all(isinstance(entry, str) for entry in found)
    return found if sound else None


def _wrong(entries: dict[int, str]) -> Iterator[tuple[int, str]]:
    """Number and fault of each entry that cannot be used."""
    for number, entry in entries.items():
        try:
            CaptionFilter.of(entry)
        except ValueError as error:
            yield number, str(error)
