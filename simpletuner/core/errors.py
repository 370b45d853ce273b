"""The errors a user can meet, each with its exit code.

    SimpleTunerError            1   anything else, with its traceback in the log file
    ├── ConfigError             2   a setting: unknown, out of range, contradictory, not built yet
    ├── DataError               3   a dataset: missing, empty, unreadable
    ├── CacheError              4   a cache: disk full, damaged pack
    ├── ModelError              5   a model: not found, gated, offline, wrong family
    ├── ExtraMissing            6   an optional package that is not installed
    ├── TrainingError           7   the run itself: loss not finite, dead adapters, no checkpoint
    └── PublishError            8   uploads

Components raise them; ``apps.cli`` catches them, prints them and exits with the code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from simpletuner.core.text import printable

RESUME = "resume_from_checkpoint=latest, the default, resumes from the last checkpoint"
"""How every advice ends after which a run can go on; true whatever the setting is now."""

_FULL = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "alloc_failed",
)
"""What torch, CUDA's libraries and the system say of a full memory, in small letters."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong in the user's files: where it stands, what it is, what to do.

    Args:
        message: What is wrong and how to mend it, one sentence.
        key: The setting, spelled as the user spelled it.
        file: The file it stands in, or None for the command line and the environment.
        line: 1-based line in that file.
    """

    message: str
    key: str = ""
    file: str | None = None
    line: int | None = None


class SimpleTunerError(Exception):
    """Root of the errors a user can meet.

    Args:
        message: What happened, and where; secrets in web addresses are left out.
        fix: What to do about it; printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        message = printable(message)
        super().__init__(message if fix is None else f"{message}\n  {fix}")
        self.message = message
        self.fix = fix


class ConfigError(SimpleTunerError):
    """One or more settings cannot be used; carries every Problem at once."""

    exit_code = 2

    def __init__(
        self,
        message: str = "",
        *,
        fix: str | None = None,
        problems: Sequence[Problem] = (),
    ) -> None:
        self.problems = tuple(problems)
        super().__init__(message or render_problems(self.problems), fix=fix)


class DataError(SimpleTunerError):
    """A dataset is missing, empty, or too damaged to train on."""

    exit_code = 3


class CacheError(SimpleTunerError):
    """A cache cannot be written or read."""

    exit_code = 4


class ModelError(SimpleTunerError):
    """A model cannot be found, fetched or loaded."""

    exit_code = 5


class ExtraMissing(SimpleTunerError):
    """An optional package is not installed; the message carries the install line."""

    exit_code = 6


class TrainingError(SimpleTunerError):
    """The run cannot go on or its result cannot be trusted."""

    exit_code = 7


class PublishError(SimpleTunerError):
    """An upload failed; what was trained is on disk."""

    exit_code = 8


class Interrupted(SimpleTunerError):
    """The run was asked to leave (SIGINT, SIGTERM) and saved itself; exits 128 + signal."""

    def __init__(self, signal_number: int, message: str, *, fix: str | None = None) -> None:
        super().__init__(message, fix=fix)
        self.exit_code = 128 + signal_number


def is_out_of_memory(error: BaseException) -> bool:
    """True if `error` says that the memory of a device or of the CPU is full."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _FULL)


def render_problems(problems: Sequence[Problem]) -> str:
    """Problems grouped by file, one line each: line number, key, message."""
    by_file: dict[str | None, list[Problem]] = {}
    for problem in problems:
        by_file.setdefault(problem.file, []).append(problem)
    blocks = []
    for file, found in by_file.items():
        count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        width = min(max(len(p.key) for p in found), 40)
        lines = [f"{file or 'command line and environment'}: {count}, nothing was run"]
        for p in sorted(found, key=lambda p: p.line or 0):
            where = f"line {p.line:<4}" if p.line else " " * 9
            lines.append(f"  {where} {p.key:<{width}}  {p.message}".rstrip())
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean x?"`` for the nearest of `known`, or an empty string."""
    near = get_close_matches(name.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
