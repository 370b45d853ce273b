"""Files written whole or not at all, digests, safe names, and the layout of an output folder."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

from simpletuner.core.errors import RESUME, ConfigError, SimpleTunerError, TrainingError

TEMPORARY, PARTIAL, REMOVING = ".tmp", ".partial", ".removing"
"""Endings of what is being written, filled and removed; a kill leaves them, nothing reads them."""


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable; a no-op where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_through(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file in a folder of its own beside `path`, then fsync and rename it.

    The file at `path` is the old one or the new one, never a part of it. A failed write leaves
    nothing behind; a kill leaves a folder ``.NAME.….tmp``, with whatever temporary files the
    library that writes makes for itself.

    Raises:
        OSError: The disk refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    place.mkdir()
    try:
        temporary = place / path.name
        write(temporary)
        # Some libraries make files that nobody else may read; the folder knows the user's umask.
        temporary.chmod(place.stat().st_mode & 0o666)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    fsync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    write_through(path, lambda temporary: temporary.write_bytes(data))


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline to `path` atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`."""
    return json.loads(path.read_text(encoding="utf-8"))


def content_digest(data: bytes) -> str:
    """32 hex digits of blake2b: the identity of a file's bytes."""
    return blake2b(data, digest_size=16).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, hex, read in pieces."""
    digest = sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def safe_name(name: str) -> str:
    """A file name for any dataset id or prompt name: readable, unique, the same everywhere.

    Names that had to be changed get a digest of the original, so that ``a/b`` and ``a_b`` differ.
    """
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:80].strip(".")
    if cleaned == name and name:
        return name
    return f"{cleaned or 'unnamed'}-{blake2b(name.encode(), digest_size=4).hexdigest()}"


def safe_join(root: Path, relative: str) -> Path:
    """`root / relative`.

    Raises:
        SimpleTunerError: The result would lie outside `root`.
    """
    path = (root / relative).resolve()
    if not path.is_relative_to(root.resolve()):
        raise SimpleTunerError(f"{relative!r} leads out of {root}")
    return path


def publish_folder(partial: Path, final: Path) -> None:
    """Give a folder that was written whole its name, in place of one that has it already.

    Raises:
        OSError: The disk refused; what had the name has it still.
    """
    doomed = final.with_name(f"{final.name}{REMOVING}")
    if final.exists():
        shutil.rmtree(doomed, ignore_errors=True)
        final.rename(doomed)
    try:
        partial.rename(final)
    except OSError:
        if doomed.exists():
            doomed.rename(final)
        raise
    fsync_folder(final.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def put_in_place(made: Path, final: Path) -> None:
    """Give a file or a folder that was written whole its name, in place of what has it already."""
    if made.is_dir():
        publish_folder(made, final)
    else:
        made.replace(final)


def remove_folder(folder: Path) -> None:
    """Remove a folder of ours; a kill in between never leaves a half one that looks whole."""
    doomed = folder.with_name(f"{folder.name}{REMOVING}")
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Remove what `write_through` left in `folder` at a kill; nobody else may be writing there."""
    for left in folder.glob(f".*.{'[0-9a-f]' * 8}{TEMPORARY}"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def writing(kind: type[SimpleTunerError], what: str, folder: Path, fix: str) -> Iterator[None]:
    """Turn the disk's refusal to take `what` into an error of `kind` that names `folder`.

    Args:
        fix: What to do when there is room again; the room there is now is said before it.
    """
    try:
        yield
    except OSError as error:
        way = file_in_the_way(folder)
        raise kind(
            f"{what} cannot be written to {folder}: {error.strerror or error}",
            fix=f"{way} is a file: move it, or name another folder, then start again"
            if way
            else f"{free_space(folder)}: {fix}",
        ) from error


def file_in_the_way(folder: Path) -> Path | None:
    """What stands where `folder` or one of those above it should be; None for nothing."""
    found = next((p for p in (folder, *folder.absolute().parents) if os.path.lexists(p)), None)
    return found if found is not None and not found.is_dir() else None


def free_space(folder: Path) -> str:
    """``"1.5 GB are free there"``, of the disk that `folder` is or would be on."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return f"{shutil.disk_usage(there).free / 1e9:.1f} GB are free there"


@dataclass(frozen=True)
class RunFolder:
    """Where things lie in `output_dir`, by SimpleTuner's names."""

    root: Path

    @property
    def images(self) -> Path:
        """Validation pictures: ``step_N_NAME_I_WxH.png`` and the ``.json`` that reproduces each."""
        return self.root / "validation_images"

    @property
    def benchmarks(self) -> Path:
        """The untouched base model's pictures of the same prompts."""
        return self.root / "benchmarks" / "base_model"

    @property
    def events(self) -> Path:
        """Every event of every start, one JSON object a line."""
        return self.root / "events.jsonl"

    @property
    def log(self) -> Path:
        """Tracebacks and developers' lines."""
        return self.root / "simpletuner.log"

    @property
    def resolved_config(self) -> Path:
        """Every setting as the run used it."""
        return self.root / "resolved_config.json"

    @property
    def run(self) -> Path:
        """What ran: versions, model, datasets, result."""
        return self.root / "run.json"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after optimizer step `step`."""
        return self.root / f"checkpoint-{step}"

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turn the disk's refusal to take `what` into a TrainingError that says how to go on."""
        fix = (
            "make room, or set output_dir to another disk and copy the folder there; then start"
            f" again; {RESUME} if there is one"
        )
        with writing(TrainingError, what, self.root, fix):
            yield

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder for files that are looked at before they take their place; gone afterwards."""
        place = self.root / f".staging.{secrets.token_hex(4)}{TEMPORARY}"
        place.mkdir()
        try:
            yield place
            fsync_folder(self.root)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second run out of the folder; the system lets go of the lock of a killed one.

        Raises:
            ConfigError: Another run has it.
            TrainingError: The disk refused.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.root / ".lock")
        with self.writing(".lock"):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise ConfigError(
                    f"another run is writing to {self.root}",
                    fix="wait for it or stop it, or set another output_dir",
                ) from None
        try:
            yield
        finally:
            lock.release()

    def sweep(self) -> None:
        """Remove what a kill left half written or half removed."""
        sweep(self.root)
        sweep(self.images)
        sweep(self.benchmarks)
        for ending in (PARTIAL, REMOVING):
            for left in self.root.glob(f"checkpoint-*{ending}"):
                shutil.rmtree(left, ignore_errors=True)
