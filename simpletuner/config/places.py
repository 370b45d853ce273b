"""What texts in settings stand for: placeholders, and where relative paths start."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

_PLACEHOLDER = re.compile(r"\{(?:env:([A-Za-z_][A-Za-z0-9_]*)|([a-z_]+))\}")


def fill(
    text: str, names: Mapping[str, str], environ: Mapping[str, str]
) -> tuple[str, tuple[str, ...]]:
    """`text` with ``{name}`` and ``{env:NAME}`` filled in, and the variables that are not set.

    Other braces stay as they are.
    """
    missing: list[str] = []

    def value(match: re.Match[str]) -> str:
        variable, name = match.groups()
        if variable is None:
            return names.get(name, match.group())
        if variable not in environ:
            missing.append(variable)
        return environ.get(variable, "")

    return _PLACEHOLDER.sub(value, text), tuple(missing)


def locate(text: str, cwd: Path, example: Path | None) -> Path:
    """Where a path that stands in a file or on the command line leads.

    Relative ones start from the working directory; in a shipped example from its folder, if it
    holds such a file: what an example writes does not go into the installed package.
    """
    path = Path(text).expanduser()
    if example and not path.is_absolute() and (example / path).exists():
        return example / path
    return cwd / path
