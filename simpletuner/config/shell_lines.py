"""Shell assignments, read and never run: ``export``, quotes, comments, ``+=``, ``${NAME}``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from simpletuner.core.errors import ConfigError, Problem

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(\+?)=")
_BRACED = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)(?::?-([^}]*))?\}")


@dataclass(frozen=True)
class Assignment:
    """One ``NAME=value``.

    Args:
        name: The variable.
        value: Quotes removed, variables filled in.
        line: Where it stands.
        exported: Written with ``export``.
        grows: Adds to the variable's earlier value (``+=`` or ``"${NAME} …"``).
        uses: The variables its value was made of.
    """

    name: str
    value: str
    line: int
    exported: bool
    grows: bool
    uses: frozenset[str]


def parse_shell(text: str, file: str, environ: Mapping[str, str]) -> list[Assignment]:
    """The assignments in `text`, in order.

    Raises:
        ConfigError: Something else than assignments and comments stands there; all lines at once.
    """
    reader = _Reader(text, environ)
    assignments: list[Assignment] = []
    problems: list[Problem] = []
    while reader.next_statement():
        line = reader.line()
        try:
            found = reader.statement()
        except _ShellError as fault:
            problems.append(Problem(str(fault), file=file, line=line))
            reader.skip_line()
        else:
            assignments.extend(found)
    if problems:
        raise ConfigError(problems=problems)
    return assignments


class _ShellError(Exception):
    """A statement that cannot be read; becomes a Problem of its line."""


class _Reader:
    """Reads one statement after the other; later ones see the variables of earlier ones."""

    def __init__(self, text: str, environ: Mapping[str, str]) -> None:
        self.text = text.replace("\r\n", "\n")
        self.at = 0
        self.variables = dict(environ)
        self.uses: set[str] = set()

    def line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def next_statement(self) -> bool:
        """Step over white space, semicolons and comments; False at the end of the text."""
        while mark := self.peek():
            if mark == "#":
                self.skip_line()
            elif mark in " \t\n;":
                self.at += 1
            else:
                return True
        return False

    def skip_line(self) -> None:
        end = self.text.find("\n", self.at)
        self.at = len(self.text) if end < 0 else end

    def statement(self) -> list[Assignment]:
        """The assignments up to the end of the line, ``;`` or a comment."""
        found: list[Assignment] = []
        exported = False
        while (mark := self.peek()) and mark not in "\n;#":
            if mark in " \t":
                self.at += 1
            elif self.text.startswith("\\\n", self.at):  # the statement goes on below
                self.at += 2
            elif re.compile(r"export(?=[ \t])").match(self.text, self.at) and not found:
                exported = True
                self.at += len("export")
            elif assignment := _ASSIGNMENT.match(self.text, self.at):
                found.append(self.assignment(assignment, exported))
            else:
                self.refuse(exported)
        return found

    def refuse(self, exported: bool) -> None:
        name = _NAME.match(self.text, self.at)
        if exported and name:  # `export NAME` of a variable set before
            self.at = name.end()
            return
        end = self.text.find("\n", self.at)
        rest = self.text[self.at : end if end >= 0 else None].strip()
        raise _ShellError(
            f"{rest[:40]!r} is not an assignment; this file is read, not run: "
            "NAME=value lines and comments only, no space around ="
        )

    def assignment(self, match: re.Match[str], exported: bool) -> Assignment:
        name, plus = match.groups()
        line = self.line()
        self.at = match.end()
        self.uses = set()
        value = self.word()
        if plus:
            value = self.variables.get(name, "") + value
        self.variables[name] = value
        grows = bool(plus) or name in self.uses
        return Assignment(name, value, line, exported, grows, frozenset(self.uses))

    def word(self) -> str:
        """One shell word: quoted and bare pieces without white space between them."""
        pieces: list[str] = []
        while (mark := self.peek()) and mark not in " \t\n;":
            if mark == "'":
                end = self.text.find("'", self.at + 1)
                if end < 0:
                    raise _ShellError("a single quote is not closed")
                pieces.append(self.text[self.at + 1 : end])
                self.at = end + 1
            elif mark == '"':
                self.at += 1
                pieces.append(self.quoted())
            else:
                pieces.append(self.piece(escapes=None))
        return "".join(pieces)

    def quoted(self) -> str:
        """The rest of a double-quoted piece."""
        pieces: list[str] = []
        while (mark := self.peek()) != '"':
            if not mark:
                raise _ShellError("a double quote is not closed")
            pieces.append(self.piece(escapes='$`"\\\n'))
        self.at += 1
        return "".join(pieces)

    def piece(self, escapes: str | None) -> str:
        """One character, escape or variable; `escapes` are what a backslash makes plain."""
        mark = self.peek()
        if mark == "\\":
            escaped = self.text[self.at + 1 : self.at + 2]
            self.at += 2
            if escaped == "\n":
                return ""
            return escaped if escapes is None or escaped in escapes else "\\" + escaped
        if mark == "`" or self.text.startswith("$(", self.at):
            raise _ShellError("commands are not run in this file; write the value itself")
        if mark == "$":
            return self.variable()
        self.at += 1
        return mark

    def variable(self) -> str:
        """The value of ``$NAME``, ``${NAME}`` or ``${NAME:-default}``; a bare ``$`` is itself."""
        start = self.at + 1
        if braced := _BRACED.match(self.text, start):
            name, default = braced.groups()
            self.at = braced.end()
        elif bare := _NAME.match(self.text, start):
            name, default = bare.group(), None
            self.at = bare.end()
        elif self.text.startswith("{", start):
            raise _ShellError("only ${NAME} and ${NAME:-default} are read here")
        else:
            self.at = start
            return "$"
        self.uses.add(name)
        return self.variables.get(name) or default or ""
