"""Every durable operation of a process as a numbered point, at which it can be hurt.

Runs inside the process that is watched: what writes, flushes, renames or removes below a folder is
wrapped, whoever calls it. A write has two points: nothing written yet, and half of it written.
Logs that grow line by line are left out; a line of them may come at any time.
"""

from __future__ import annotations

import errno
import io
import os
import pathlib
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LOGS = ("events.jsonl", "simpletuner.log")
GROWING = ("create", "mkdir", "write", "half", "fsync")
"""Operations that a full disk refuses."""

_LONGEST_WAIT_SECONDS = 600


def plain(where: str) -> str:
    """A point's path without what chance has named: the same in every run and for every family.

    ``cache/index/.one.parquet.0b34ba28.tmp/one.parquet`` is ``cache/index/one.parquet``.
    """
    where = re.sub(r"\.([^/]+?)\.[0-9a-f]{8}\.tmp(/\1$)?", r"\1", where)
    where = re.sub(r"[0-9a-f]{13}-\d{3}-[0-9a-f]{8}(?=\.)", "PACK", where)
    where = re.sub(r"\.removing/.+", ".removing/FILE", where)
    return re.sub(r"^((cache/)?(text|vae))/[^/]+", r"\1/FAMILY", where)


@dataclass(frozen=True)
class Plan:
    """What happens at which point.

    Args:
        at: Its number, counted from 1; 0 is never.
        act: ``kill`` (SIGKILL), ``full`` (the disk takes nothing more), ``signals``, or ``wait``.
        what: The only operation that is counted; all if empty.
        only: Points whose path does not contain this are not counted.
        path: The only `plain` path that is counted; all if empty.
        signals: Sent to the process itself, in this order.
        gate: Waited for until it is there; ``GATE.reached`` is made first.
        file_bytes: No file may grow beyond this: a full disk as the system tells it; 0 is no limit.
    """

    at: int = 0
    act: str = "kill"
    what: str = ""
    only: str = ""
    path: str = ""
    signals: Sequence[int] = ()
    gate: str = ""
    file_bytes: int = 0


@dataclass
class Watch:
    """Counts points below `root`, writes them down in `record` and acts at the planned one."""

    root: Path
    record: Path
    plan: Plan
    count: int = 0
    full: bool = False
    lock: Any = field(default_factory=threading.RLock)

    def install(self) -> None:
        """Wrap what can change the disk."""
        import PIL.Image
        import pyarrow.parquet
        import safetensors.torch

        if self.plan.file_bytes:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (self.plan.file_bytes, resource.RLIM_INFINITY)
            )
        self._record = os.open(self.record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.open = self._opens(os.open)  # type: ignore[assignment]
        os.mkdir = self._makes(os.mkdir)  # type: ignore[assignment]
        os.fsync = self._flushes(os.fsync)  # type: ignore[assignment]
        os.pwritev = self._pours(os.pwritev)  # type: ignore[assignment]
        for name in ("rename", "replace"):
            setattr(os, name, self._renames(name, getattr(os, name)))
        for name in ("unlink", "remove", "rmdir"):
            setattr(os, name, self._removes(name, getattr(os, name)))
        for owner, name, argument in (
            (pathlib.Path, "write_bytes", 0),
            (pathlib.Path, "write_text", 0),
            (safetensors.torch, "save_file", 1),
            (pyarrow.parquet, "write_table", 1),
            (PIL.Image.Image, "save", 1),
        ):
            setattr(owner, name, self._writes(name, getattr(owner, name), argument))

    def point(self, what: str, path: Path, half: Callable[[], object] | None = None) -> None:
        """Pass a point; `half` is done first where the plan strikes here.

        Raises:
            OSError: The plan is a full disk, and it is full.
        """
        with self.lock:
            where = str(path.relative_to(self.root))
            os.write(self._record, f"{what} {where}\n".encode())
            struck = self._strikes(what, where)
            if (struck or (self.full and what in GROWING)) and half is not None:
                half()
            if struck and self.plan.act == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if struck and self.plan.act == "signals":
                for number in self.plan.signals:
                    os.kill(os.getpid(), number)
            if struck and self.plan.act == "wait":
                _wait_for(Path(self.plan.gate))
            if struck and self.plan.act == "full":
                self.full = True
            if self.plan.act == "full" and (struck or (self.full and what in GROWING)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def _strikes(self, what: str, where: str) -> bool:
        plan = self.plan
        counts = plan.what in ("", what) and plan.path in ("", plain(where)) and plan.only in where
        self.count += counts
        return counts and self.count == plan.at

    def ours(self, path: Path) -> bool:
        """True for what is below the root and no log."""
        return path.is_relative_to(self.root) and path.name not in _LOGS

    def _opens(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & os.O_CREAT and self.ours(Path(path)):
                self.point("create", Path(path))
            return real(path, flags, *rest, **more)

        return call

    def _makes(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(path: Any, *rest: Any, **more: Any) -> None:
            if self.ours(Path(path)) and not Path(path).exists():
                self.point("mkdir", Path(path))
            real(path, *rest, **more)

        return call

    def _flushes(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            path = _path_of(descriptor)
            if self.ours(path):
                self.point("fsync", path)
            real(descriptor)

        return call

    def _pours(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
            path = _path_of(descriptor)
            if self.ours(path):
                data = b"".join(buffers)
                self.point("write", path)
                self.point("half", path, lambda: real(descriptor, [data[: len(data) // 2]], offset))
            return real(descriptor, buffers, offset)

        return call

    def _renames(self, name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any) -> None:
            if self.ours(Path(target)):
                self.point(name, Path(target))
            real(source, target)

        return call

    def _removes(self, name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(path: Any, *, dir_fd: int | None = None) -> None:
            whole = Path(path) if dir_fd is None else _path_of(dir_fd) / path
            if self.ours(whole):
                self.point(name, whole)
            real(path, dir_fd=dir_fd)

        return call

    def _writes(self, name: str, real: Callable[..., Any], argument: int) -> Callable[..., Any]:
        from safetensors import SafetensorError

        def call(*given: Any, **more: Any) -> Any:
            target = given[argument]
            if not isinstance(target, (str, Path)) or not self.ours(Path(target)):
                return real(*given, **more)
            path = Path(target)

            def half() -> None:
                real(*given, **more)
                os.truncate(path, path.stat().st_size // 2)

            try:
                self.point("write", path)
                self.point("half", path, half)
            except OSError as error:
                if name != "save_file":
                    raise
                reason = f"I/O error: {error.strerror} (os error {error.errno})"
                raise SafetensorError(f"Error while serializing: {reason}") from None
            return real(*given, **more)

        return call


def record_windows(path: Path) -> None:
    """Write down which samples each optimizer step is given: the order of the samples."""
    import json

    from simpletuner.training.prefetch import Prefetcher

    real = Prefetcher.window
    file = io.open(path, "a")  # noqa: UP020  the process ends by itself or by a signal

    def window(self: Prefetcher, step: int) -> Any:
        found = real(self, step)
        ids = [
            [(s.dataset, s.id, s.occurrence, s.caption) for s in batch.samples]
            for _, batch in found
        ]
        file.write(json.dumps({"step": step, "samples": ids}) + "\n")
        file.flush()
        return found

    Prefetcher.window = window  # type: ignore[method-assign]


def watch(order: Mapping[str, Any]) -> None:
    """Do what an order asks to be done before the run begins."""
    if "root" in order:
        plan = Plan(**order.get("plan", {}))
        Watch(Path(order["root"]), Path(order["record"]), plan).install()
    if "windows" in order:
        record_windows(Path(order["windows"]))


def _wait_for(gate: Path) -> None:
    Path(f"{gate}.reached").touch()
    until = time.monotonic() + _LONGEST_WAIT_SECONDS
    while not gate.exists():
        assert time.monotonic() < until, f"nobody made {gate}"
        time.sleep(0.01)


def _path_of(descriptor: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
