"""What encoding captions and encoding pictures share: progress, writing behind, giving memory back.

Letters: B batch.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import TracebackType
from typing import Self
from weakref import ref

import torch

from simpletuner.cache.store import TensorStore
from simpletuner.core.errors import CacheError, ModelError, is_out_of_memory
from simpletuner.core.events import Bus, Stage, StageProgress

Group = Sequence[tuple[TensorStore, bytes, Mapping[str, torch.Tensor]]]


class EncodingStage:
    """Takes encoded groups, writes them from a thread of its own, and tells how far it is.

    Copies from the device happen on that thread too, so neither the disk nor the copy holds the
    encoder back. On leaving, also by an error or Ctrl-C, what was handed over is sealed.

    Args:
        name: What the user reads.
        total: Entries to encode.
        bus: Hears of the progress.
        fix: What to do if the encoder gives values that are not finite.
        depth: Groups that may wait; more hold the encoder back.
    """

    def __init__(self, name: str, total: int, bus: Bus, fix: str, depth: int = 4) -> None:
        self._name, self._total, self._bus = name, total, bus
        self._fix, self._depth = fix, depth
        self._done = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cache-writer")
        self._waiting: deque[Future[None]] = deque()
        self._stores: dict[int, TensorStore] = {}

    def put(self, group: Group) -> None:
        """Hand over a group.

        Raises:
            CacheError: An earlier group could not be written.
            ModelError: An earlier group held values that are not finite.
        """
        self._stores.update({id(store): store for store, _, _ in group})
        self._waiting.append(self._pool.submit(self._write, group))
        while len(self._waiting) > self._depth:
            self._waiting.popleft().result()
        self.advance(len(group))

    def advance(self, count: int) -> None:
        """Count entries as dealt with."""
        self._done += count
        self._bus.emit(
            StageProgress(stage=self._name, state="running", done=self._done, total=self._total)
        )

    def _write(self, group: Group) -> None:
        for store, key, tensors in group:
            ours = {name: tensor.cpu() for name, tensor in tensors.items()}
            for tensor in ours.values():
                require_finite(tensor, self._name, self._fix)
            store.put(key, ours)

    def _seal(self) -> None:
        for store in self._stores.values():
            store.seal()

    def __enter__(self) -> Self:
        self._bus.emit(Stage(stage=self._name, state="running", total=self._total))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # On the writer's thread, for an order to leave is raised in this one, and may be just now.
        # The future is waited for, not the thread: a join that is broken off counts as done.
        sealed = self._pool.submit(self._seal)
        try:
            wait([sealed])
        finally:
            wait([sealed])
            self._pool.shutdown()
        for future in (*self._waiting, sealed):
            future.result()
        if error is None:
            self._bus.emit(
                Stage(stage=self._name, state="finished", done=self._done, total=self._total)
            )


def require_finite(tensor: torch.Tensor, name: str, fix: str) -> None:
    """Keep what an encoder lost to overflow out of the cache.

    Raises:
        ModelError: A value is infinite or not a number.
    """
    if not torch.isfinite(tensor).all():
        raise ModelError(f"{name}: the encoder gave values that are not finite", fix=fix)


@contextmanager
def encoding(what: str, fix: str) -> Iterator[None]:
    """Turn a memory that gets full into an error that says what is left to do.

    Args:
        what: What is encoded at once: ``"4 pictures of 1024x768"``.
        fix: What to do to need less of it.

    Raises:
        CacheError: The memory is full.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise CacheError(f"the memory is full while encoding {what}", fix=fix) from error


def nothing_to_encode(name: str, found: int, bus: Bus) -> None:
    """Say that all entries of a stage were in the cache."""
    note = f"all {found} in the cache"
    bus.emit(Stage(stage=name, state="finished", done=found, total=found, note=note))


def release_memory(device: torch.device, models: Sequence[ref[torch.nn.Module]]) -> None:
    """Give back what `models` held, which nobody refers to any more.

    Cycles are looked for only where a model is still there: that takes a third of a second.
    """
    if any(model() is not None for model in models):
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
