"""Settings from their sources: the three file formats, the environment, the command line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from simpletuner.config.flags import split_flags
from simpletuner.config.json_lines import JsonObject, inner_lines, parse_json, plain, repeated
from simpletuner.config.shell_lines import Assignment, parse_shell
from simpletuner.config.source import Given, Source, read_text, shown
from simpletuner.config.toml_lines import parse_toml
from simpletuner.config.variables import ENVIRONMENT_NAMES, EXTRA_ARGUMENTS, SELECTORS
from simpletuner.core.errors import ConfigError, Problem

SECRET = (
    "secrets do not belong in settings: log in (`hf auth login`, `wandb login`), or export it in "
    "the shell as an environment variable"
)
"""What to say of a key or a value that is one."""

_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}"
    r"|\bAKIA[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY|\bglpat-[A-Za-z0-9_-]{20}"
)


def looks_secret(value: Any) -> bool:
    """True if `value` holds text that looks like an access token or a key."""
    if isinstance(value, dict):
        return any(looks_secret(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(looks_secret(item) for item in value)
    return isinstance(value, str) and _SECRET.search(value) is not None


class Reader:
    """Reads settings, knowing which there are.

    Args:
        is_known: True for the spelling of a setting that is built, planned or explained.
        is_switch: True for the spelling of a setting that needs no value as a flag.
        known: The settings' names, to find the nearest.
    """

    def __init__(
        self,
        is_known: Callable[[str], bool],
        is_switch: Callable[[str], bool],
        known: Sequence[str],
    ) -> None:
        self._is_known = is_known
        self._is_switch = is_switch
        self._known = known

    def file(self, path: Path, cwd: Path, environ: Mapping[str, str]) -> Source:
        """The keys of a settings file; its suffix says the format.

        Raises:
            ConfigError: It cannot be read.
        """
        name = shown(path, cwd)
        text = read_text(path, name)
        if path.suffix == ".toml":
            given = [Given(key, value, name, line) for key, value, line in parse_toml(text, name)]
            return Source(path, tuple(given))
        if path.suffix == ".env":
            return self._shell(path, name, text, environ)
        if path.suffix != ".json":
            raise ConfigError(f"{name}: a settings file ends in .json, .toml or .env")
        return Source(path, object_keys(parse_json(text, name), name))

    def environment(self, environ: Mapping[str, str]) -> list[Given]:
        """The settings in the environment: the variables that are listed, then the flags in one."""
        given = [
            Given(name, environ[name], text=True, origin=f"the environment variable {name}")
            for name in ENVIRONMENT_NAMES
            if environ.get(name)
        ]
        words = split_words(environ.get(EXTRA_ARGUMENTS, ""), None, None)
        return given + self.flags(words, f"the environment variable {EXTRA_ARGUMENTS}")

    def flags(self, words: Sequence[str], origin: str = "") -> list[Given]:
        """The settings on a command line."""
        return [
            Given(flag.key, flag.value, text=True, origin=origin)
            for flag in split_flags(words, self._is_switch)
        ]

    def _shell(self, path: Path, name: str, text: str, environ: Mapping[str, str]) -> Source:
        assignments = parse_shell(text, name, environ)
        last = {a.name: a for a in assignments}
        used = frozenset().union(*(a.uses for a in assignments))
        given: list[Given] = []
        exports: dict[str, str] = {}
        notes: list[str] = []
        problems: list[Problem] = []
        for a in assignments:
            replaced = last[a.name] is not a and last[a.name].grows
            if a.name == EXTRA_ARGUMENTS or replaced:
                continue
            if a.name in SELECTORS:
                notes.append(
                    f"{name} line {a.line}: {a.name} is read from the shell, not from here"
                )
            elif self._is_known(a.name):
                given.append(Given(a.name, a.value, name, a.line, text=True))
            elif a.name not in used and (
                near := get_close_matches(a.name.lower(), self._known, 1, 0.8)
            ):
                message = f"unknown setting; did you mean {near[0].upper()}?"
                problems.append(Problem(message, a.name, name, a.line))
            elif looks_secret(a.value):
                problems.append(Problem(SECRET, a.name, name, a.line))
            elif a.exported:
                exports[a.name] = a.value
            elif a.name not in used:
                notes.append(f"{name} line {a.line}: {a.name} is no setting and not exported")
        given += self._extra_arguments(assignments, name, problems)
        if problems:
            raise ConfigError(problems=problems)
        return Source(path, tuple(given), exports, tuple(notes))

    def _extra_arguments(
        self, assignments: Sequence[Assignment], name: str, problems: list[Problem]
    ) -> list[Given]:
        """The flags in ``TRAINER_EXTRA_ARGS`` as it ends up, each with the line that added it."""
        lines: dict[str, int] = {}
        words: list[str] = []
        for a in assignments:
            if a.name != EXTRA_ARGUMENTS:
                continue
            words = split_words(a.value, name, a.line)
            for word in words:
                lines.setdefault(word, a.line)
        try:
            flags = split_flags(words, self._is_switch)
        except ConfigError as error:
            problems += [replace(p, file=name, line=lines.get(p.key)) for p in error.problems]
            return []
        return [
            Given(flag.key, flag.value, name, lines[flag.words[0]], text=True) for flag in flags
        ]


def split_words(text: str, file: str | None, line: int | None) -> list[str]:
    """`text` split as a shell splits it.

    Raises:
        ConfigError: A quote is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        message = f"cannot be split into flags: {str(error).lower()}"
        raise ConfigError(problems=[Problem(message, EXTRA_ARGUMENTS, file, line)]) from None


def object_keys(value: Any, file: str) -> tuple[Given, ...]:
    """The keys of a JSON object, each with its line.

    Raises:
        ConfigError: It is no object, or an object inside it has a key twice.
    """
    if not isinstance(value, JsonObject):
        raise ConfigError(
            problems=[Problem('must be an object: { "key": value, … }', file=file, line=1)]
        )
    given = []
    problems = []
    for entry in value.entries:
        for first, second in repeated(entry.value):
            message = f"is already set on line {first.line}; keep one of the two"
            problems.append(Problem(message, f"{entry.key}.{second.key}", file, second.line))
        lines = inner_lines(entry.value)
        given.append(Given(entry.key, plain(entry.value), file, entry.line, lines=lines))
    if problems:
        raise ConfigError(problems=problems)
    return tuple(given)


def last_of_each(
    given: Sequence[Given], name_of: Callable[[Given], str], notes: list[str]
) -> list[Given]:
    """Of several flags of one setting the last, as one adds them to a script's; that is noted."""
    chosen: dict[str, Given] = {}
    for item in given:
        name = name_of(item)
        if name in chosen:
            notes.append(f"{item.key} stands twice on the command line; {item.value} counts")
        chosen[name] = item
    return list(chosen.values())
