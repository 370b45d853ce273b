"""Pictures that are not trained on, and how they are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from simpletuner.core.text import printable

FAULTS_ALLOWED = (2, 0.05)
"""So many pictures, or this share of them, may be unusable before it is an error."""

FAULTS_LISTED = 10


@dataclass(frozen=True)
class Excluded:
    """Pictures that are not trained on for one reason.

    Args:
        reason: A fault, or the setting that leaves them out.
        count: How many.
        example: The path of one of them, or its address without secrets.
    """

    reason: str
    count: int
    example: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "example", printable(self.example))


def pictures(count: int) -> str:
    """``1 picture``, ``2 pictures``."""
    return "1 picture" if count == 1 else f"{count} pictures"


def listed(reasons: Mapping[str, str]) -> str:
    """The first reasons, a line each."""
    first = list(reasons.items())[:FAULTS_LISTED]
    lines = [f"  {printable(path)}: {reason}" for path, reason in first]
    if len(reasons) > FAULTS_LISTED:
        lines.append(f"  and {len(reasons) - FAULTS_LISTED} more")
    return "\n".join(lines)
