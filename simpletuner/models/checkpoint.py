"""A checkpoint on this machine: a diffusers folder, or one file and such a folder for the rest."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.core.errors import ModelError, is_out_of_memory
from simpletuner.core.files import content_digest, read_json, sha256_file, write_json

if TYPE_CHECKING:
    import torch

CONFIGS = (".json", ".txt", ".model")
"""Besides weights, what a part's folder holds: its config, or a tokenizer's vocabulary."""


@dataclass(frozen=True)
class Checkpoint:
    """Opens parts of a checkpoint and tells what they are.

    Args:
        label: What the user named it; a folder's name only, never its path.
        folder: A folder in diffusers layout; for a single file, one with configs and what it lacks.
        file: A single ``.safetensors`` file with the weights, or None.
        inside: The parts that the file holds; None for all.
        variant: ``fp16`` and the like, part of the weights' file names.
        revision: The branch, tag or commit it was fetched from, for the record.
        vae: Another checkpoint's folder to take the VAE from, or None.
        digests: A file that remembers digests by path, size and time: gigabytes are read once.
    """

    label: str
    folder: Path
    file: Path | None = None
    inside: frozenset[str] | None = None
    variant: str | None = None
    revision: str | None = None
    vae: Path | None = None
    digests: Path | None = None

    @property
    def facts(self) -> dict[str, str]:
        """What names this checkpoint to somebody who wants to open it too; no paths."""
        facts = {"base_model": self.label, "revision": self.revision, "variant": self.variant}
        facts["vae"] = self.vae.name if self.vae else None
        return {name: value for name, value in facts.items() if value}

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

    def config(self, part: str) -> Mapping[str, Any]:
        """The ``config.json`` of one component."""
        found: Mapping[str, Any] = read_json(self._part_folder(part) / "config.json")
        return found

    def scheduler(self, **changes: Any) -> Any:
        """A fresh instance of the checkpoint's own scheduler, with `changes` to its config.

        One that cannot rescale its betas gives way to DDIM, which can.
        """
        import diffusers

        cls = getattr(diffusers, self.scheduler_config["_class_name"])
        rescales = "rescale_betas_zero_snr"
        if changes.get(rescales) and rescales not in signature(cls.__init__).parameters:
            cls = diffusers.DDIMScheduler
        return cls.from_config(dict(self.scheduler_config), **changes)

    def open_pipeline(self, name: str, *, options: Mapping[str, Any], dtype: torch.dtype) -> Any:
        """The stock pipeline `name`.

        Args:
            options: What its constructor is told; a part that is None is not opened.

        Raises:
            ModelError: It cannot be read as such a pipeline.
        """
        import diffusers

        cls = getattr(diffusers, name)
        options = {"dtype": dtype, "local_files_only": True, **options}
        texts = [part for part in self._text_models if options.get(part, part) is not None]
        if any(self._in_file(part) for part in texts):
            for part in (each for each in texts if not self._in_file(each)):
                options[part] = self._read(part, partial(self._open_text, part, dtype))
            file, configs = str(self.file), str(self.folder)
            return self._read(name, lambda: cls.from_single_file(file, config=configs, **options))
        options |= {"variant": self.variant, "use_safetensors": True}
        return self._read(name, lambda: cls.from_pretrained(self.folder, **options))

    @property
    def _text_models(self) -> list[str]:
        return [name for name in self.index if name.startswith("text_encoder") and self.has(name)]

    def _in_file(self, part: str) -> bool:
        return self.file is not None and (self.inside is None or part in self.inside)

    def _open_text(self, part: str, dtype: torch.dtype) -> Any:
        import transformers

        cls = getattr(transformers, self.index[part][1])
        return cls.from_pretrained(self.folder / part, dtype=dtype, local_files_only=True)

    def open_part(self, part: str, dtype: torch.dtype) -> Any:
        """One component (``unet``, ``vae``, …) in `dtype`, on the CPU.

        Raises:
            ModelError: It is missing or cannot be read.
        """
        return self._read(part, lambda: self._open_part(part, dtype))

    def open_tokenizer(self, part: str) -> Any:
        """The tokenizer `part`.

        Raises:
            ModelError: It is missing or cannot be read.
        """
        import transformers

        cls = getattr(transformers, self.index[part][1])
        return self._read(
            part, lambda: cls.from_pretrained(self.folder / part, local_files_only=True)
        )

    def text_blueprint(self, part: str, dtype: torch.dtype) -> Any:
        """A text encoder on the ``meta`` device, frozen, or a tokenizer; None where it has none."""
        import torch
        import transformers

        if not self.has(part):
            return None
        if part.startswith("tokenizer"):
            return self.open_tokenizer(part)
        cls = getattr(transformers, self.index[part][1])
        with torch.device("meta"):
            model = cls(cls.config_class.from_pretrained(self.folder / part))
        return model.to(dtype).requires_grad_(False).eval()

    def has(self, part: str) -> bool:
        """True if the pipeline comes with `part`; a refiner has one text encoder only."""
        return all(self.index.get(part) or (None,))

    def _open_part(self, part: str, dtype: torch.dtype) -> Any:
        import diffusers

        elsewhere = part == "vae" and self.vae is not None
        name = "AutoencoderKL" if elsewhere else self.index[part][1]
        cls, folder = getattr(diffusers, name), self._part_folder(part)
        options = {"dtype": dtype, "local_files_only": True}
        if self._in_file(part) and not elsewhere:
            return cls.from_single_file(
                str(self.file), config=str(self.folder), subfolder=part, **options
            )
        chosen = {_variant(path) for path in self._weights(folder)}
        variant = self.variant if self.variant in chosen else None
        return cls.from_pretrained(folder, variant=variant, use_safetensors=True, **options)

    def _read(self, what: str, call: Callable[[], Any]) -> Any:
        """What `call` opens, every weight filled; what is wrong with it becomes a ModelError."""
        from diffusers import DiffusionPipeline
        from diffusers.loaders.single_file_utils import SingleFileComponentError
        from safetensors import SafetensorError
        from torch import nn

        try:
            opened = call()
        except KeyError as error:
            raise self._unreadable(what, f"{error} is not in it") from error
        except NotImplementedError as error:  # it moves a module whose weights are on "meta"
            raise self._unreadable(what, "some of its weights are missing") from error
        except SingleFileComponentError as error:  # its further lines advise a programmer
            raise self._unreadable(what, str(error).partition("\n")[0]) from error
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            if is_out_of_memory(error):  # nothing is wrong with the checkpoint
                raise
            raise self._unreadable(what, str(error)) from error
        pipeline = isinstance(opened, DiffusionPipeline)
        modules = opened.components.values() if pipeline else [opened]
        for module in (m for m in modules if isinstance(m, nn.Module)):
            empty = [name for name, weight in module.named_parameters() if weight.is_meta]
            if empty:
                raise self._unreadable(what, f"it lacks {len(empty)} weights, such as {empty[0]}")
        return opened

    def _unreadable(self, part: str, why: str) -> ModelError:
        return ModelError(
            f"{self.label}: cannot open its {part}: {why}",
            fix="check that the checkpoint is complete and of the model_family you named",
        )

    def variants(self) -> set[str | None]:
        """The variants that some part's weights in the folder come in; None is the plain one."""
        return {_variant(path) for path in self.folder.glob("*/*.safetensors")}

    def digest(self, parts: Iterable[str]) -> str:
        """32 hex digits over the configs and weights of `parts`.

        They follow what is read of the checkpoint: not its place, nor other files beside it.
        """
        lines = [
            f"{part}/{'weights' if path == self.file else path.name}:{self._file_digest(path)};"
            for part in parts
            for path in self._files(part)
        ]
        return content_digest("".join(sorted(lines)).encode())

    def _files(self, part: str) -> list[Path]:
        """The configs and weights of `part`."""
        folder = self._part_folder(part)
        found = [p for p in folder.glob("*") if p.suffix in CONFIGS and ".index." not in p.name]
        if self.file is None or not self._in_file(part) or folder != self.folder / part:
            return found + self._weights(folder)
        return [*found, self.file]

    def _part_folder(self, part: str) -> Path:
        if part != "vae" or self.vae is None:
            return self.folder / part
        return self.vae / part if (self.vae / part).is_dir() else self.vae

    def _weights(self, folder: Path) -> list[Path]:
        """A part's weights in `variant`; the plain ones, as in diffusers, where it has no such."""
        files = list(folder.glob("*.safetensors"))
        chosen = [path for path in files if _variant(path) == self.variant]
        return chosen or [path for path in files if _variant(path) is None]

    def _file_digest(self, path: Path) -> str:
        target = path.resolve()
        if target.parent.name == "blobs" and len(target.name) == 64:
            return target.name  # the hub's cache names large files by their SHA-256
        if path.suffix != ".safetensors":
            return content_digest(path.read_bytes())
        stat = target.stat()
        key = f"{target}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in self._known_digests:
            self._known_digests[key] = sha256_file(path)
            if self.digests is not None:
                with suppress(OSError):  # a memory only: a full disk is told by what needs it
                    write_json(self.digests, self._known_digests)
        return self._known_digests[key]

    @cached_property
    def _known_digests(self) -> dict[str, str]:
        if self.digests is None or not self.digests.is_file():
            return {}
        try:
            return dict(read_json(self.digests))
        except (ValueError, TypeError):
            return {}  # a memory only: what cannot be read is computed again


def _variant(weights: Path) -> str | None:
    """``fp16`` of ``model.fp16.safetensors`` and of ``model.fp16-00001-of-00002.safetensors``."""
    pieces = re.sub(r"-\d{5}-of-\d{5}", "", weights.name).split(".")
    return pieces[1] if len(pieces) > 2 else None
