"""Orders to a run: SIGINT and SIGTERM make it leave cleanly, a second one at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from simpletuner.core.errors import RESUME, Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME_COMMAND = " with the same command: it does what is missing"


class _Leave(BaseException):
    """An order to leave on its way out: libraries rename or swallow what is an Exception."""

    def __init__(self, told: Interrupted) -> None:
        super().__init__()
        self.told = told


class Control:
    """Listens to signals while it is open.

    Outside the loop a signal ends the work where it is, and the context is left as Interrupted;
    what was encoded so far is sealed on the way out. Inside `deferred` the first one is remembered
    for the loop, which finishes its step and saves; the second one ends the process at once, with
    the last checkpoint intact.
    """

    def __init__(self) -> None:
        self.leave: int | None = None
        self._open = self._deferred = self._reached_loop = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Control:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        self._open = True  # only from here is there someone who catches what the handler raises
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._open = False
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, _Leave):
            raise error.told from None

    def leaving(self) -> bool:
        """True once an order to leave has come."""
        return self.leave is not None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals wait for the loop to look at `leave` while the context is open."""
        self._deferred = self._reached_loop = True
        try:
            yield
        finally:
            self._deferred = False

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.leave is not None:
            os._exit(128 + number)
        self.leave = number
        if self._open and not self._deferred:
            advice = f"; {RESUME}" if self._reached_loop else _SAME_COMMAND
            told = Interrupted(
                number,
                f"stopped by {signal.Signals(number).name} outside the steps;"
                " what was encoded and saved is kept",
                fix=f"start it again{advice}",
            )
            raise _Leave(told)
