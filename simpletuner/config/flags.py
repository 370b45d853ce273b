"""Settings on the command line: ``--key value``, ``--key=value``, ``key=value``, ``--switch``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from simpletuner.core.errors import ConfigError, Problem

_PAIR = re.compile(r"(?P<key>-*[A-Za-z_$][\w-]*)=(?P<value>.*)", re.DOTALL)
_BARE = re.compile(r"-+(?P<key>[A-Za-z_][\w-]*)")

TRUE_WORDS = frozenset({"true", "yes", "on", "1"})
FALSE_WORDS = frozenset({"false", "no", "off", "0"})


@dataclass(frozen=True)
class Flag:
    """One setting of a command line.

    Args:
        key: As written, dashes included.
        value: Its text; True for a switch without one.
        words: The words it was read from.
    """

    key: str
    value: str | bool
    words: tuple[str, ...]


def split_flags(
    words: Sequence[str], is_switch: Callable[[str], bool], file: str | None = None
) -> list[Flag]:
    """The settings in `words`, in order.

    Args:
        words: The command line, split as a shell splits it.
        is_switch: True if the setting of that spelling needs no value.
        file: The file the words stand in, for messages.

    Raises:
        ConfigError: A word is no setting, or a setting has no value; all at once.
    """
    flags: list[Flag] = []
    problems: list[Problem] = []
    at = 0
    while at < len(words):
        word, following = words[at], words[at + 1 : at + 2]
        at += 1
        if pair := _PAIR.fullmatch(word):
            flags.append(Flag(pair["key"], pair["value"], (word,)))
        elif not _BARE.fullmatch(word):
            problems.append(Problem("is not a setting; write --key value or key=value", word, file))
        elif takes(word, following, is_switch):
            flags.append(Flag(word, following[0], (word, following[0])))
            at += 1
        elif is_switch(word):
            flags.append(Flag(word, True, (word,)))
        else:
            problems.append(Problem("needs a value: --key value or --key=value", word, file))
    if problems:
        raise ConfigError(problems=problems)
    return flags


def takes(word: str, following: Sequence[str], is_switch: Callable[[str], bool]) -> bool:
    """True if the next word is the value of `word`; a switch takes only true, false and so on."""
    if not following:
        return False
    value = following[0]
    if is_switch(word):
        return value.lower() in TRUE_WORDS | FALSE_WORDS
    return not value.startswith("--")
