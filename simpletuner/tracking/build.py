"""The sinks of a run, from its settings."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console

from simpletuner.core.events import Sink
from simpletuner.core.files import RunFolder
from simpletuner.tracking.sinks.console import ConsoleSink
from simpletuner.tracking.sinks.jsonl import JsonlSink
from simpletuner.tracking.sinks.plain import PlainSink

if TYPE_CHECKING:
    from simpletuner.tracking.settings import TrackingSettings


def build_sinks(settings: TrackingSettings, folder: RunFolder) -> list[Sink]:
    """What a person sees, and the log of events in the output folder.

    Args:
        settings: Which trackers are told besides.
        folder: Of the run.
    """
    console = Console()
    live = console.is_terminal and not console.is_dumb_terminal
    return [ConsoleSink(console) if live else PlainSink(sys.stdout), JsonlSink(folder.events)]
