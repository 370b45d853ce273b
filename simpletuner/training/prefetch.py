"""The next window is read from the caches while the device works on this one."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simpletuner.cache.caches import Caches
    from simpletuner.core.types import Batch, Place, PlannedBatch
    from simpletuner.data.plan import BatchPlan

Window = tuple[tuple["PlannedBatch", "Batch"], ...]


class Prefetcher:
    """Reads windows in order, one ahead; an error is raised where its window is asked for.

    Args:
        place: Whose share is read; a CUDA device gets its batches in pinned memory.
        last: No window at or past this step is read.
    """

    def __init__(self, plan: BatchPlan, caches: Caches, place: Place, last: int) -> None:
        self._plan, self._caches, self._place, self._last = plan, caches, place, last
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[Window]] | None = None

    def window(self, step: int) -> Window:
        """The batches of optimizer step `step`; starts on those of the next one."""
        if self._ahead is not None and self._ahead[0] == step:
            ready = self._ahead[1].result()
        else:
            ready = self.read(step)
        following = step + 1
        self._ahead = (
            (following, self._pool.submit(self.read, following)) if following < self._last else None
        )
        return ready

    def read(self, step: int) -> Window:
        """The batches of one window, read now."""
        planned = self._plan.window(step, self._place.rank)
        batches = [self._caches.batch(each) for each in planned]
        if self._place.device.type == "cuda":
            batches = [batch.pinned() for batch in batches]
        return tuple(zip(planned, batches, strict=True))

    def close(self) -> None:
        """Let the thread go."""
        self._pool.shutdown(wait=True, cancel_futures=True)
