"""The log a program reads: one JSON object a line, for every event of every start."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from simpletuner.core.events import Event


class JsonlSink:
    """Appends events to a file and flushes each, so that a kill loses at most half a line.

    Args:
        path: Made when missing. A half line left by an earlier kill is ended first: it spoils
            itself only.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def handle(self, event: Event) -> None:
        """Append one line."""
        line = json.dumps(_finite(event.as_dict()), ensure_ascii=False, allow_nan=False)
        self._file.write(line.encode("utf-8") + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as null, which JSON has no numbers for."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list():
            return [_finite(item) for item in value]
        case _:
            return value
