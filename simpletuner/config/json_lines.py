"""JSON that remembers the line of every key, and says what to look for where it is not JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from json import JSONDecodeError
from json.decoder import scanstring  # type: ignore[attr-defined]
from json.scanner import NUMBER_RE
from typing import Any

from simpletuner.core.errors import ConfigError, Problem

_WORDS = {"true": True, "false": False, "null": None}
_HINTS = {
    "'": "text takes double quotes",
    "/": "JSON has no comments; remove it, or write config.toml instead",
    "#": "JSON has no comments; remove it, or write config.toml instead",
    "True": "write true",
    "False": "write false",
    "None": "write null",
    "NaN": "NaN is not a JSON value",
    "Infinity": "Infinity is not a JSON value",
}


@dataclass(frozen=True)
class Entry:
    """A key of an object, the line it stands on, and its value."""

    key: str
    line: int
    value: Any


@dataclass(frozen=True)
class JsonObject:
    """An object with its keys in order; a key may stand there twice."""

    line: int
    entries: tuple[Entry, ...]


def parse_json(text: str, file: str) -> Any:
    """The JSON value in `text`: lists and scalars as Python's, objects as `JsonObject`.

    Raises:
        ConfigError: It is not JSON; the Problem names line, column and what to look for.
    """
    reader = _Reader(text, file)
    try:
        return reader.document()
    except RecursionError:
        raise reader.error("lists and objects lie too deep in each other here") from None


def plain(value: Any) -> Any:
    """`value` with its objects as dicts; of a key written twice the last."""
    if isinstance(value, JsonObject):
        return {entry.key: plain(entry.value) for entry in value.entries}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def inner_lines(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """The line of every key of the objects inside `value`, by path."""
    if not isinstance(value, JsonObject):
        return {}
    lines: dict[tuple[str, ...], int] = {}
    for entry in value.entries:
        lines[(*path, entry.key)] = entry.line
        lines.update(inner_lines(entry.value, (*path, entry.key)))
    return lines


def repeated(value: Any) -> Iterator[tuple[Entry, Entry]]:
    """Pairs of entries of one object inside `value` that have the same key."""
    if isinstance(value, list):
        for item in value:
            yield from repeated(item)
    if isinstance(value, JsonObject):
        first: dict[str, Entry] = {}
        for entry in value.entries:
            earlier = first.setdefault(entry.key, entry)
            if earlier is not entry:
                yield earlier, entry
            yield from repeated(entry.value)


class _Reader:
    """A recursive-descent reader over the standard library's string and number scanners."""

    def __init__(self, text: str, file: str) -> None:
        self.text = text
        self.file = file
        self.at = 0

    def document(self) -> Any:
        if not self.text.strip():
            raise self.error("is empty; the smallest file is {}", 0)
        value = self.value()
        if self.peek():
            raise self.error("something follows after the end of the file's value")
        return value

    # --- positions -----------------------------------------------------------------------------

    def line(self, at: int) -> int:
        return self.text.count("\n", 0, at) + 1

    def error(self, message: str, at: int | None = None) -> ConfigError:
        at = self.at if at is None else at
        column = at - (self.text.rfind("\n", 0, at) + 1) + 1
        return ConfigError(
            problems=[Problem(f"column {column}: {message}", file=self.file, line=self.line(at))]
        )

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
            self.at += 1
        return self.text[self.at : self.at + 1]

    def last_mark(self) -> int:
        """Where the text before the white space before here ends."""
        return len(self.text[: self.at].rstrip()) - 1

    # --- values --------------------------------------------------------------------------------

    def value(self) -> Any:
        mark = self.peek()
        if mark == "{":
            return self.read_object()
        if mark == "[":
            return self.read_list()
        if mark == '"':
            return self.string()
        return self.number() if mark and mark in "-0123456789" else self.word()

    def string(self) -> str:
        start = self.at
        try:
            text, self.at = scanstring(self.text, start + 1, True)
        except JSONDecodeError as error:
            raise self.error(self.string_fault(error), min(error.pos, len(self.text))) from None
        return str(text)

    def string_fault(self, error: JSONDecodeError) -> str:
        if error.msg.startswith("Invalid control"):
            return "the text is not closed on its line; a double quote is missing"
        if error.msg.startswith("Unterminated"):
            return "the text that starts here is not closed; a double quote is missing"
        return 'a backslash in text is written twice: "C:\\\\pictures"'

    def number(self) -> int | float:
        match = NUMBER_RE.match(self.text, self.at)
        if match is None:
            raise self.error("a number is expected after the minus sign")
        whole, fraction, exponent = match.groups()
        self.at = match.end()
        return float(match.group()) if fraction or exponent else int(whole)

    def word(self) -> Any:
        end = self.at
        while end < len(self.text) and (self.text[end].isalnum() or self.text[end] in "_-."):
            end += 1
        word = self.text[self.at : end]
        if word in _WORDS:
            self.at = end
            return _WORDS[word]
        raise self.error(self.missing("a value", word))

    def missing(self, wanted: str, word: str = "") -> str:
        """What to say where `wanted` should stand."""
        mark = self.text[self.at : self.at + 1]
        hint = _HINTS.get(word) or _HINTS.get(mark)
        if not hint and wanted == "a value" and word:
            hint = "text takes double quotes"
        found = f"found {word or mark!r}" if mark else "the file ends here"
        return f"{wanted} is expected, {found}{'; ' + hint if hint else ''}"

    # --- objects and lists -----------------------------------------------------------------------

    def read_object(self) -> JsonObject:
        line = self.line(self.at)
        self.at += 1
        entries: list[Entry] = []
        while self.more("}", bool(entries)):
            if self.peek() != '"':
                raise self.error(self.missing("a name in double quotes"))
            key_line = self.line(self.at)
            key = self.string()
            if self.peek() != ":":
                raise self.error(self.missing("a colon after the name"))
            self.at += 1
            entries.append(Entry(key, key_line, self.value()))
        return JsonObject(line, tuple(entries))

    def read_list(self) -> list[Any]:
        self.at += 1
        items: list[Any] = []
        while self.more("]", bool(items)):
            items.append(self.value())
        return items

    def more(self, close: str, started: bool) -> bool:
        """True if another item follows; steps over the comma or over `close`."""
        mark = self.peek()
        if mark == close:
            self.at += 1
            return False
        if not started:
            return True
        if mark != ",":
            if mark and mark in "/#":
                raise self.error(self.missing(f"a comma or {close}"))
            raise self.error(self.no_comma(close), self.last_mark())
        comma = self.at
        self.at += 1
        if self.peek() == close:
            raise self.error(f"a comma stands before the closing {close}; remove the comma", comma)
        return True

    def no_comma(self, close: str) -> str:
        if not self.text[self.at :]:
            return f"the file ends before the closing {close}"
        return f"a comma or the closing {close} is missing after this value"
