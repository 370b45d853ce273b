"""A sink that keeps what it is told."""

from __future__ import annotations

from simpletuner.core.events import Event


class Heard:
    """A sink that keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def handle(self, event: Event) -> None:
        """Keep it."""
        self.events.append(event)

    def close(self) -> None:
        """Nothing is held open."""
