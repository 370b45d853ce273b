"""Pictures on their way to the encoder: in a bounded pool, in order, never without their name.

Letters: H W the crop in px.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from simpletuner.core.errors import DataError
from simpletuner.data.excluded import listed
from simpletuner.data.pixels import PictureError

if TYPE_CHECKING:
    from simpletuner.core.types import Sample
    from simpletuner.data.control import Pictures


@dataclass(frozen=True)
class Task:
    """One picture to encode.

    Args:
        row: Its number in `source`.
        content: Digest of its file.
        key: Of its latents.
        size: What is encoded, (width, height) in px.
    """

    source: Pictures
    row: int
    content: str
    key: bytes
    size: tuple[int, int]

    def joins(self, group: Sequence[Task]) -> bool:
        """True if it is encoded together with `group`, which is not empty."""
        first = group[0]
        same = self.size == first.size and self.source is first.source
        return same and len(group) < self.source.settings.vae_batch_size


Decoded = tuple[Task, torch.Tensor | PictureError]
"""A task with its pixels, [3, H, W] uint8, or why there are none."""


@contextmanager
def decoding(tasks: Sequence[Task]) -> Generator[Iterator[Decoded]]:
    """`tasks` in their order, decoded by threads that are a bounded number of pictures ahead."""
    settings = [source.settings for source in {t.source.id: t.source for t in tasks}.values()]
    workers = min(max(each.max_workers for each in settings), os.cpu_count() or 1)
    ahead = workers + 2 * max(each.vae_batch_size for each in settings)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        yield _in_order(pool, tasks, ahead)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ThreadPoolExecutor, tasks: Sequence[Task], ahead: int) -> Iterator[Decoded]:
    waiting: deque[tuple[Task, Future[torch.Tensor | PictureError]]] = deque()
    for task in tasks:
        waiting.append((task, pool.submit(_decode_or_fault, task)))
        if len(waiting) > ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


def decode_now(source: Pictures, samples: Sequence[Sample]) -> list[torch.Tensor]:
    """[3, H, W] uint8 of each draw.

    Raises:
        DataError: One cannot be decoded. The index of `source` keeps that, so that the next start
            leaves it out.
    """
    found, faults = [], {}
    for sample in samples:
        try:
            found.append(_decode(source, sample))
        except PictureError as error:
            faults[sample.path] = error.reason
    if faults:
        source.remember(faults)
        (path, reason), *others = faults.items()
        more = "".join(f"\n{line}" for line in [listed(dict(others))] if others)
        raise DataError(
            f"dataset {source.id}: {path} {reason}{more}",
            fix="start again with --on_data_change continue, which leaves it out, or repair it and"
            " start again; `simpletuner data verify` finds all such pictures at once",
        )
    return found


def _decode(source: Pictures, drawn: int | Sample) -> torch.Tensor:
    return torch.from_numpy(source.pixels(drawn)).permute(2, 0, 1).contiguous()


def _decode_or_fault(task: Task) -> torch.Tensor | PictureError:
    try:
        return _decode(task.source, task.row)
    except PictureError as error:
        return error
