"""Text conditioning by caption: encoded once, by encoders that are gone before training.

Letters: B batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol
from weakref import ref

import numpy as np
import torch

from simpletuner.cache.fingerprint import text_keys
from simpletuner.cache.stage import (
    EncodingStage,
    encoding,
    nothing_to_encode,
    release_memory,
    require_finite,
)
from simpletuner.cache.store import naming
from simpletuner.cache.truncation import tell_cut
from simpletuner.core.errors import CacheError

if TYPE_CHECKING:
    from simpletuner.cache.store import TensorStore
    from simpletuner.core.events import Bus
    from simpletuner.core.types import Place
    from simpletuner.models.family import Family


class Encoders(Protocol):
    """What the text encoders are held in."""

    def format(self, part: str) -> str:
        """The number format of an encoder, ``no_change`` for its own."""

    def __call__(self, part: str, model: torch.nn.Module, device: torch.device) -> None:
        """Convert an encoder, before it moves to `device`."""


STAGE = "text embeddings"
_FIX = "set mixed_precision to no, or check the text encoders' files"


class TextCache:
    """The conditioning of captions, on disk.

    Args:
        family: Whose text encoders they are sent to.
        store: Where it is kept.
        place: Where and in what dtype the encoders run.
        batch_size: Captions encoded at once.
        encoders: What they are held in.
        keeps: False if each caption is encoded at every visit.
        waits: True if a caption is encoded when it is first asked for.
    """

    def __init__(
        self,
        family: Family,
        store: TensorStore,
        place: Place,
        *,
        batch_size: int = 4,
        encoders: Encoders | None = None,
        keeps: bool = True,
        waits: bool = False,
    ) -> None:
        unknown = {name: kind for name, kind in family.layouts.items() if kind != "stack"}
        if unknown:
            raise NotImplementedError(f"{family.name}: no way to batch {unknown} was built")
        self._family, self._store, self._place = family, store, place
        self._batch_size = batch_size
        self._encoders, self._keeps, self._live = encoders, keeps, waits or not keeps
        self._pipe: Any = None
        self._lock = Lock()
        self._numbers = str(place.dtype)
        for part in family.text_parts:
            name = encoders.format(part) if encoders and part.startswith("text_encoder") else ""
            if name not in ("", "no_change"):
                self._numbers += f" {part}:{name}"
        self._model = family.fingerprint("text")

    def prepare(self, captions: Mapping[str, Iterable[str]], bus: Bus) -> None:
        """Encode those of `captions` that are missing; without any, no encoder is opened.

        Where captions are encoded when they are asked for, nothing is encoded now.

        Args:
            captions: By whose they are, for messages.
            bus: Told of progress, and of captions that are longer than the encoders see.

        Raises:
            CacheError: The cache cannot be written, or the memory is full.
            ModelError: The encoders cannot be opened.
        """
        held = {title: set(each) for title, each in captions.items()}
        wanted = list(set().union(*held.values()))
        keys = self._keys(wanted)
        new = {wanted[i] for i in np.flatnonzero(self._store.locate(keys) < 0).tolist()}
        if not self._keeps:
            new = set(wanted)
        if not new:
            nothing_to_encode(STAGE, len(wanted), bus)
            return
        tell_cut(self._family, {title: sorted(new & each) for title, each in held.items()}, bus)
        if self._live:
            when = "first needs it" if self._keeps else "needs it"
            bus.notice(
                f"{STAGE}: {len(new)} captions, each encoded when training {when}; the text"
                " encoders stay loaded"
            )
            # Now, for opening a model draws from torch's own generator, which training reseeds.
            self._open()
            return
        ordered = sorted(new)
        encoders = self._encode(dict(zip(self._keys(ordered), ordered, strict=True)), bus)
        release_memory(self._place.device, encoders)

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return self._store.folder

    def keys(self, captions: Iterable[str]) -> set[bytes]:
        """The entries of captions."""
        return set(self._keys(captions))

    def embeds(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """The conditioning of B captions by the pipeline's argument names, [B, …], on the CPU.

        Raises:
            CacheError: One was never prepared, its entry is damaged, or the memory is full.
        """
        if not self._keeps:
            made = [self._now(caption) for caption in captions]
            return {name: torch.stack([each[name] for each in made]) for name in made[0]}
        rows = self._store.locate(self._keys(captions))
        if (rows < 0).any():
            absent = [captions[i] for i in np.flatnonzero(rows < 0).tolist()]
            if not self._live:
                raise CacheError(
                    f"the caption {absent[0]!r} is not in the cache {self._store.folder}",
                    fix="start again: missing captions are encoded before training",
                )
            absent = list(dict.fromkeys(absent))
            for caption, key in zip(absent, self._keys(absent), strict=True):
                self._store.put(key, self._now(caption))
            rows = self._store.locate(self._keys(captions))
        slots = {slot.name: slot for slot in self._store.layout(int(rows[0]))}
        batch = {
            name: torch.empty((len(rows), *slots[name].shape), dtype=slots[name].dtype)
            for name in self._family.layouts
        }
        for i, row in enumerate(rows.tolist()):
            with naming(f"the caption {captions[i]!r}"):
                self._store.read_into(row, {name: tensor[i] for name, tensor in batch.items()})
        return batch

    def close(self) -> None:
        """Let the encoders go, and seal what was encoded on demand."""
        if self._pipe is not None:
            encoders, self._pipe = _modules(self._pipe), None
            release_memory(self._place.device, encoders)
        self._store.seal()

    def _now(self, caption: str) -> dict[str, torch.Tensor]:
        """The conditioning of one caption, without the batch dimension, on the CPU."""
        # A validation asks in one thread while batches are read ahead in another.
        with self._lock, encoding("1 caption", self._less_memory(1)):
            (embeds,) = self._family.encode_text(self._open(), [caption])
        made = {name: tensor.cpu() for name, tensor in embeds.items()}
        for tensor in made.values():
            require_finite(tensor, STAGE, _FIX)
        return made

    def _open(self) -> Any:
        """The stock pipeline with the encoders, which stay."""
        if self._pipe is None:
            self._pipe = self._family.open_text(self._place, self._encoders)
        return self._pipe

    def _encode(self, captions: dict[bytes, str], bus: Bus) -> list[ref[torch.nn.Module]]:
        """Encode `captions`; returns the encoders, which were let go."""
        keys = list(captions)
        pipe = self._family.open_text(self._place, self._encoders)
        with EncodingStage(STAGE, len(keys), bus, _FIX) as stage:
            for start in range(0, len(keys), self._batch_size):
                group = keys[start : start + self._batch_size]
                texts = [captions[key] for key in group]
                what = f"{len(texts)} {'captions' if len(texts) > 1 else 'caption'}"
                with encoding(what, self._less_memory(len(texts))):
                    embeds = self._family.encode_text(pipe, texts)
                stage.put(
                    [(self._store, key, each) for key, each in zip(group, embeds, strict=True)]
                )
        return _modules(pipe)

    def _less_memory(self, count: int) -> str:
        """What is left to do where `count` captions at once are too much."""
        if count > 1:
            name = "text_encoder_batch_size"
            return f"lower {name} (a text_embeds entry may have its own) and start again"
        if self._place.dtype == torch.float32:
            return "set mixed_precision bf16 and start again"
        return "end what else uses this memory, or take a device that has more, and start again"

    def _keys(self, captions: Iterable[str]) -> list[bytes]:
        return text_keys(captions, model=self._model, dtype=self._numbers)


def _modules(pipe: Any) -> list[ref[torch.nn.Module]]:
    """The networks of a pipeline that is let go."""
    parts = pipe.components.values()
    return [ref(each) for each in parts if isinstance(each, torch.nn.Module)]


class TextCaches:
    """Where each dataset's captions are kept.

    Args:
        default: For those that name no other, and for prompts.
        own: By the id of the dataset; several may share one.
    """

    def __init__(self, default: TextCache, own: Mapping[str, TextCache]) -> None:
        self.default, self._own = default, own

    @property
    def all(self) -> list[TextCache]:
        """Each of them once."""
        return list(dict.fromkeys([self.default, *self._own.values()]))

    def of(self, dataset: str) -> TextCache:
        """The one of a dataset."""
        return self._own.get(dataset, self.default)

    def close(self) -> None:
        """Let the encoders go, and seal what was encoded on demand."""
        for cache in self.all:
            cache.close()

    def prepare(
        self, captions: Mapping[str, Iterable[str]], prompts: Iterable[str], bus: Bus
    ) -> None:
        """Encode what is missing; see `TextCache.prepare`.

        Args:
            captions: By the id of their dataset.
            prompts: Of validation.
            bus: Told of progress.
        """
        for cache in self.all:
            own = {name: each for name, each in captions.items() if self.of(name) is cache}
            cache.prepare(titled(own, prompts if cache is self.default else ()), bus)


def titled(captions: Mapping[str, Iterable[str]], prompts: Iterable[str]) -> dict[str, set[str]]:
    """Captions, which are given by the id of their dataset, and prompts, as messages call them."""
    found = {f"dataset {name}": set(each) for name, each in captions.items()}
    return {**found, "validation prompts": set(prompts)}
