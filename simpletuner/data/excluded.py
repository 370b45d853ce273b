"""Pictures that are not trained on, and how they are told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

FAULTS_ALLOWED = (2, 0.05)
"""So many pictures, or this share of them, may be unusable before it is an error."""

FAULTS_LISTED = 10

_ADDRESS = re.compile(r"(?i)(https?://)(?:[^\s/?#]*@)?([^\s?#]*)([?#]\S*)?")


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
        object.__setattr__(self, "example", without_secrets(self.example))


def pictures(count: int) -> str:
    """``1 picture``, ``2 pictures``."""
    return "1 picture" if count == 1 else f"{count} pictures"


def listed(reasons: Mapping[str, str]) -> str:
    """The first reasons, a line each."""
    first = list(reasons.items())[:FAULTS_LISTED]
    lines = [f"  {without_secrets(path)}: {reason}" for path, reason in first]
    if len(reasons) > FAULTS_LISTED:
        lines.append(f"  and {len(reasons) - FAULTS_LISTED} more")
    return "\n".join(lines)


def without_secrets(text: str) -> str:
    """`text` without the passwords and the queries, which may be signed, of its web addresses."""
    return _ADDRESS.sub(lambda m: m[1] + m[2] + ("?…" if m[3] else ""), text)
