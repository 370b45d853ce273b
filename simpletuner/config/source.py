"""What a file, the environment or the command line gave: key, value, and where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simpletuner.core.errors import ConfigError, Problem


@dataclass(frozen=True)
class Given:
    """One key with its value, as the user wrote it.

    Args:
        key: Spelled as in the source.
        value: A plain JSON value; text where the source knows nothing else.
        file: The file it stands in; None for the environment and the command line.
        line: 1-based line in that file.
        text: True if the source has only text (shell syntax, flags), so that ``"16"`` is no slip.
        origin: What a note calls the source: ``"the environment variable LEARNING_RATE"``.
        lines: Lines of the keys inside an object value, by their path (``("betas",)``).
    """

    key: str
    value: Any
    file: str | None = None
    line: int | None = None
    text: bool = False
    origin: str = ""
    lines: Mapping[tuple[str, ...], int] = field(default_factory=dict)

    def problem(self, message: str, *, inside: tuple[str, ...] = ()) -> Problem:
        """`message` about this key, or about a key inside its object value."""
        key = ".".join((self.key, *inside))
        return Problem(message, key=key, file=self.file, line=self.lines.get(inside, self.line))

    def part(self, name: str) -> Given:
        """The key `name` inside this key's object value, as a Given of its own."""
        line = self.lines.get((name,), self.line)
        return replace(self, key=f"{self.key}.{name}", value=self.value, line=line, lines={})

    @property
    def place(self) -> str:
        """``line 3``, the origin, or ``the command line``."""
        return f"line {self.line}" if self.line else self.origin or "the command line"


@dataclass(frozen=True)
class Source:
    """One settings file, read but not yet understood.

    Args:
        path: The file.
        given: Its keys in order; a key may stand there twice.
        exports: Environment variables a shell-syntax file sets for other programs.
        notes: What the reader of that file should know.
    """

    path: Path
    given: tuple[Given, ...]
    exports: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_text(path: Path, name: str) -> str:
    """The UTF-8 text of `path`, without a byte order mark.

    Args:
        path: The file.
        name: What messages call it.

    Raises:
        ConfigError: It cannot be opened or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        problem = Problem("is not UTF-8 text; save the file as UTF-8", file=name, line=line)
    except OSError as error:
        problem = Problem(f"cannot be read: {error.strerror}", file=name)
    raise ConfigError(problems=[problem])


def shown(path: Path, cwd: Path) -> str:
    """`path` as messages show it: relative to the working directory where it lies inside it."""
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)
