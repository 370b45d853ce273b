"""Files written whole or not at all, digests, safe names, and the layout of an output folder."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

from simpletuner.core.errors import SimpleTunerError


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
    """Let `write` fill a temporary file beside `path`, then fsync it and rename it into place.

    The file at `path` is the old one or the new one, never a part of it; a failed write leaves
    nothing behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
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


def remove_folder(folder: Path) -> None:
    """Remove a folder of ours; a kill in between never leaves a half one that looks whole."""
    doomed = folder.with_name(f"{folder.name}.removing")
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)


@dataclass(frozen=True)
class RunFolder:
    """Where things lie in `output_dir`, by SimpleTuner's names."""

    root: Path

    @property
    def images(self) -> Path:
        """Validation pictures: ``step_N_NAME_I_WxH.png`` and the ``.json`` that reproduces each."""
        return self.root / "validation_images"

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
