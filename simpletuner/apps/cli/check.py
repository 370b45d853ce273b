"""``simpletuner check``: the whole validation of a configuration, without running anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simpletuner.apps.cli import print_json
from simpletuner.config.flat import flatten
from simpletuner.config.load import Loaded, load
from simpletuner.config.source import shown
from simpletuner.core.errors import ConfigError, Problem

HELP = """\
usage: simpletuner check [--json] [--config PATH | --env NAME | --example NAME] [--key value …]

Reads the settings as `simpletuner train` does, with the same arguments, and says what is wrong with
them, what was read loosely, and what is asked for but not built yet. Runs nothing.

  --json  the same as one JSON object on standard output

exit code: 0 if the settings can be used (also if something in them is not built yet), else 2
"""


def run(arguments: Sequence[str]) -> int:
    """Check the settings that `arguments` name."""
    if {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return 0
    words = [word for word in arguments if word != "--json"]
    as_json = len(words) < len(arguments)
    try:
        loaded = load(words, os.environ, Path.cwd())
    except ConfigError as error:
        if not as_json:
            raise
        print_json({"ok": False, "problems": _problems(error), "fix": error.fix})
        return error.exit_code
    if as_json:
        print_json(_facts(loaded))
    else:
        print("\n".join(_lines(loaded)))
    return 0


def _problems(error: ConfigError) -> list[dict[str, Any]]:
    problems = error.problems or (Problem(error.message),)
    return [asdict(problem) for problem in problems]


def _facts(loaded: Loaded) -> dict[str, Any]:
    return {
        "ok": True,
        "files": [str(file) for file in loaded.files],
        "problems": [],
        "pending": [asdict(problem) for problem in loaded.pending],
        "notes": list(loaded.notes),
        "config": flatten(loaded.config),
        "datasets": [entry.model_dump(mode="json") for entry in loaded.datasets.pictures],
    }


def _lines(loaded: Loaded) -> list[str]:
    lines = [f"note: {note}" for note in loaded.notes]
    if loaded.pending:
        lines += ["not built yet, `simpletuner train` will refuse it:"]
        lines += [f"  {pending_line(problem)}" for problem in loaded.pending]
    names = " and ".join(shown(file, Path.cwd()) for file in loaded.files)
    sets = ", ".join(entry.id for entry in loaded.datasets.pictures)
    return [*lines, f"no problems in {names} (datasets: {sets})"]


def pending_line(problem: Problem) -> str:
    """Where a setting that is not built yet stands, and what it asks for."""
    where = f"{problem.file} line {problem.line}: " if problem.file and problem.line else ""
    return f"{where}{problem.key}  {problem.message}"
