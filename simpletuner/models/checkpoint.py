"""One checkpoint on this machine: a diffusers folder, or a single file with such a folder's configs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.core.errors import ModelError
from simpletuner.core.files import content_digest, read_json, sha256_file, write_json

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Checkpoint:
    """Opens parts of a checkpoint and tells what they are.

    Args:
        label: What the user named it; a folder's name only, never its path.
        folder: A folder in diffusers layout; for a single file, one that holds its configs.
        file: A single ``.safetensors`` file with all weights, or None.
        variant: ``fp16`` and the like, part of the weights' file names.
        vae: Another checkpoint's folder to take the VAE from, or None.
        digests: A file that remembers digests by path, size and time, so that gigabytes are read once.
    """

    label: str
    folder: Path
    file: Path | None = None
    variant: str | None = None
    vae: Path | None = None
    digests: Path | None = None

    @cached_property
    def index(self) -> Mapping[str, Any]:
        """``model_index.json``."""
        found: Mapping[str, Any] = read_json(self.folder / "model_index.json")
        return found

    @cached_property
    def scheduler_config(self) -> Mapping[str, Any]:
        """``scheduler/scheduler_config.json``."""
        found: Mapping[str, Any] = read_json(self.folder / "scheduler" / "scheduler_config.json")
        return found

    def scheduler(self) -> Any:
        """A fresh instance of the checkpoint's own scheduler."""
        import diffusers

        cls = getattr(diffusers, self.scheduler_config["_class_name"])
        return cls.from_config(dict(self.scheduler_config))

    def open_pipeline(self, name: str, *, without: Iterable[str], dtype: torch.dtype) -> Any:
        """The stock pipeline `name` without some of its parts.

        Raises:
            ModelError: It cannot be read as such a pipeline.
        """
        import diffusers

        cls = getattr(diffusers, name)
        absent: dict[str, None] = dict.fromkeys(without)
        try:
            if self.file is not None:
                return cls.from_single_file(
                    str(self.file),
                    config=str(self.folder),
                    dtype=dtype,
                    local_files_only=True,
                    **absent,
                )
            return cls.from_pretrained(
                self.folder,
                dtype=dtype,
                variant=self.variant,
                local_files_only=True,
                **absent,
            )
        except (OSError, ValueError, KeyError) as error:
            raise self._unreadable(name, error) from error

    def open_part(self, part: str, dtype: torch.dtype) -> Any:
        """One component (``unet``, ``vae``, …) in `dtype`, on the CPU.

        Raises:
            ModelError: It is missing or cannot be read.
        """
        import diffusers

        elsewhere = self.vae if part == "vae" else None
        folder = elsewhere or self.folder
        subfolder = part if (folder / part).is_dir() else None
        try:
            if elsewhere is not None:
                cls = diffusers.AutoencoderKL
            else:
                cls = getattr(diffusers, self.index[part][1])
            if self.file is not None and elsewhere is None:
                return cls.from_single_file(
                    str(self.file),
                    config=str(self.folder),
                    subfolder=part,
                    dtype=dtype,
                    local_files_only=True,
                )
            return cls.from_pretrained(
                folder,
                subfolder=subfolder,
                dtype=dtype,
                variant=None if elsewhere else self.variant,
                local_files_only=True,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(part, error) from error

    def _unreadable(self, part: str, error: Exception) -> ModelError:
        return ModelError(
            f"{self.label}: cannot open its {part}: {error}",
            fix="check that the checkpoint is complete and of the model_family you named",
        )

    def digest(self, parts: Iterable[str]) -> str:
        """32 hex digits over the configs and weights of `parts`."""
        total = blake2b(digest_size=16)
        for path in self._files(parts):
            total.update(f"{path.name}:{self._file_digest(path)};".encode())
        return total.hexdigest()

    def _files(self, parts: Iterable[str]) -> list[Path]:
        found: set[Path] = set()
        for part in parts:
            folder = self.folder / part
            if part == "vae" and self.vae is not None:
                folder = self.vae / part if (self.vae / part).is_dir() else self.vae
            elif self.file is not None:
                found.add(self.file)
            if folder.is_dir():
                found |= {p for p in folder.iterdir() if p.suffix != ".md" and p.is_file()}
        return sorted(found)

    def _file_digest(self, path: Path) -> str:
        target = path.resolve()
        if target.parent.name == "blobs" and len(target.name) == 64:
            return target.name  # the hub's cache names large files by their SHA-256
        if self.digests is None or path.stat().st_size < 1 << 20:
            return content_digest(path.read_bytes()) if path.suffix == ".json" else sha256_file(path)
        stat = target.stat()
        key = f"{target}:{stat.st_size}:{stat.st_mtime_ns}"
        known = self._known_digests()
        if key not in known:
            known[key] = sha256_file(path)
            write_json(self.digests, known)
        return known[key]

    def _known_digests(self) -> dict[str, str]:
        if self.digests is None or not self.digests.is_file():
            return {}
        try:
            return dict(read_json(self.digests))
        except json.JSONDecodeError:
            return {}  # a memory only: what cannot be read is computed again
