"""A working directory with settings files, for tests of what is read from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simpletuner.config.load import Loaded, load
from simpletuner.core.errors import ConfigError, Problem

PICTURES: dict[str, Any] = {"id": "pictures", "type": "local", "instance_data_dir": "pictures"}


class Workplace:
    """A folder that a configuration is loaded in.

    Args:
        root: The working directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "config").mkdir()
        (root / "pictures").mkdir()

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def config(self, text: str = "", **settings: Any) -> None:
        """Write config/config.json: `text`, or `settings` with a family."""
        self.write("config/config.json", text or json.dumps({"model_family": "sdxl", **settings}))

    def datasets(self, text: str = "", *entries: Mapping[str, Any]) -> None:
        """Write config/multidatabackend.json: `text`, or `entries`."""
        listed = text or json.dumps(list(entries) or [PICTURES], indent=1)
        self.write("config/multidatabackend.json", listed)

    def load(self, *arguments: str, **environ: str) -> Loaded:
        return load(arguments, environ, self.root)

    def problems(self, *arguments: str, **environ: str) -> Sequence[Problem]:
        """What is wrong; empty if it loads."""
        try:
            self.load(*arguments, **environ)
        except ConfigError as error:
            return error.problems or (Problem(error.message + (error.fix or "")),)
        return ()

    def messages(self, *arguments: str, **environ: str) -> list[str]:
        """``key: message`` of every problem."""
        return [f"{p.key}: {p.message}" for p in self.problems(*arguments, **environ)]
