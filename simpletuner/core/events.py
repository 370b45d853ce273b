"""What a run tells the world, and the bus that carries it to the sinks.

Sinks cannot touch training and cannot slow it: each has a bounded queue and a thread of its own.
Events marked `coalesce` may be dropped when a queue is full, for the next one says the same again.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from simpletuner.core.text import printable

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Event:
    """A fact of the run; `at` is seconds since the epoch."""

    name: ClassVar[str]
    coalesce: ClassVar[bool] = False
    at: float = field(default_factory=time.time)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the event's name first."""
        return {"event": self.name, **{k: _plain(v) for k, v in asdict(self).items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """The run was resolved; `summary` is what the console prints, in order."""

    name: ClassVar[str] = "run.started"
    summary: Mapping[str, str]
    total_steps: int
    first_step: int


@dataclass(frozen=True, kw_only=True)
class Stage(Event):
    """Progress of a stage before training: indexing, text embeddings, latents, loading.

    `done` of `total` (0 while unknown); `state` is ``running``, then ``finished`` once.
    """

    name: ClassVar[str] = "stage"
    stage: str
    state: str
    done: int = 0
    total: int = 0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class StageProgress(Stage):
    """A stage's progress between its start and its end; may be dropped."""

    coalesce: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """One optimizer step: `loss` is the mean over its window, `seconds` excludes duties."""

    name: ClassVar[str] = "step"
    step: int
    total_steps: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float | None
    seconds: float
    samples: int


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is complete on disk."""

    name: ClassVar[str] = "checkpoint"
    step: int
    folder: Path
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ImagesMade(Event):
    """Validation pictures of one step."""

    name: ClassVar[str] = "validation.images"
    step: int
    images: Sequence[Path]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Notice(Event):
    """Something the user should read; `level` is ``info`` or ``warning``."""

    name: ClassVar[str] = "notice"
    level: str
    text: str


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """The run ended by itself; `lines` is the closing block."""

    name: ClassVar[str] = "run.finished"
    step: int
    weights: Path
    verified: str
    lines: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class RunFailed(Event):
    """The run ended early; `message` is what the user reads."""

    name: ClassVar[str] = "run.failed"
    message: str
    exit_code: int


class Sink(Protocol):
    """A receiver of events; runs on a thread of its own."""

    def handle(self, event: Event) -> None:
        """Take one event."""

    def close(self) -> None:
        """Flush and let go of what is held."""


class _Worker:
    def __init__(self, sink: Sink, size: int) -> None:
        self.sink = sink
        self.size = size
        self.queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self.thread = threading.Thread(
            target=self._run, name=f"sink-{type(sink).__name__}", daemon=True
        )
        self.thread.start()

    def put(self, event: Event) -> None:
        # A stuck receiver must not hold the run: it loses repeatable events first, then all.
        limit = self.size if event.coalesce else 100 * self.size
        if self.queue.qsize() < limit:
            self.queue.put(event)

    def _run(self) -> None:
        while (event := self.queue.get()) is not None:
            self._guard(lambda event=event: self.sink.handle(event))
        self._guard(self.sink.close)

    def _guard(self, call: Any) -> None:
        try:
            call()
        except Exception:  # door 2 of 4: a sink's fault is logged and never reaches the run
            log.exception("%s failed on an event", type(self.sink).__name__)


class Bus:
    """Carries events to sinks; `emit` returns at once.

    Args:
        sinks: Their receivers.
        size: Events a sink may lag behind before coalescing ones are dropped.
    """

    def __init__(self, sinks: Sequence[Sink] = (), size: int = 1000) -> None:
        self._workers = [_Worker(sink, size) for sink in sinks]

    def emit(self, event: Event) -> None:
        """Tell every sink."""
        for worker in self._workers:
            worker.put(event)

    def notice(self, text: str, level: str = "info") -> None:
        """Emit a Notice; secrets in web addresses are left out."""
        self.emit(Notice(level=level, text=printable(text)))

    def close(self, timeout: float = 10.0) -> None:
        """Let every sink drain its queue and close; leaves a stuck one behind after `timeout` s."""
        for worker in self._workers:
            worker.queue.put(None)
        for worker in self._workers:
            worker.thread.join(timeout)
        self._workers = []
