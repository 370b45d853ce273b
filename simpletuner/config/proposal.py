"""What a user asks for as a whole, as the checks see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from simpletuner.config.flat import SETTINGS
from simpletuner.config.source import Given
from simpletuner.core.errors import Problem


@dataclass(frozen=True)
class Proposal:
    """Settings that are valid one by one.

    Args:
        values: Every setting by its key, given or default; a required one that is absent is not in.
        given: What the user wrote, by key.
        device: What this machine trains on: ``cuda``, ``mps`` or ``cpu``.
    """

    values: Mapping[str, Any]
    given: Mapping[str, Given]
    device: str = "cpu"

    def says(self, key: str) -> Any:
        """The value the user gave for `key`, None without one."""
        return self.values.get(key) if key in self.given else None

    def problem(self, key: str, message: str) -> Problem:
        """`message` about `key`, with its line where the user gave it."""
        return self.given[key].problem(message) if key in self.given else Problem(message, key=key)

    def asks(self, key: str) -> bool:
        """True if the user gave `key` another value than its default."""
        return self.says(key) not in (None, SETTINGS[key].field.default)


Check = Callable[[Proposal], Iterator[Problem]]
