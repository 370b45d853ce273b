"""One dataset, ready to be drawn from: who is usable, what is done to each, what it is called."""

from __future__ import annotations

import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from simpletuner.core.errors import DataError
from simpletuner.core.events import Bus
from simpletuner.core.files import safe_name
from simpletuner.core.seeds import Seeds, key64
from simpletuner.core.types import Geometry, Sample
from simpletuner.data import buckets
from simpletuner.data.geometry import Sizes
from simpletuner.data.index import NO_CAPTION, Index
from simpletuner.data.pixels import PictureError, decode, render
from simpletuner.data.rules import background, caption_rule, geometry_rule, size_filter
from simpletuner.data.settings import DatasetSettings
from simpletuner.data.storage.base import PICTURE_SUFFIXES
from simpletuner.data.storage.local import LocalStorage

FAULTS_ALLOWED = (2, 0.05)
"""So many pictures, or this share of them, may be unusable before it is an error."""

FAULTS_LISTED = 10


class DataSource:
    """The n usable pictures of one dataset; rows are numbered in the order of their paths.

    Build it with `open`.

    Attributes:
        id: The dataset's name.
        settings: Its settings.
        repeats: Further passes within an epoch.
        probability: How often it is drawn from, beside the other datasets.
        content: [n] void of 16 bytes, the digest of each file; ``bytes(content[row])``.
        keys: [n] u64, the first 8 bytes of `content`.
        sizes: [n, 2] the upright size of each file.
        resizes: [n, 2] its size after the one resize.
        buckets: [n, 2] int32 width and height that is encoded.
        rejects: Reason by path of the pictures that cannot be used.
        left_out: How many each of the user's filters took.
    """

    def __init__(self, settings: DatasetSettings, index: Index, table: pa.Table, bus: Bus) -> None:
        self.settings = settings
        self.id = settings.id
        self.repeats = settings.repeats
        self.probability = settings.probability
        self._index = index
        self._whole = table
        self._bus = bus
        self._captions = caption_rule(settings)
        self._geometry = geometry_rule(settings)
        sound, self.rejects = self._sound(table)
        usable, self.left_out = self._wanted(sound)
        self._paths = usable["path"].combine_chunks()
        self._texts = usable["caption"].combine_chunks()
        self.content = _bytes16(usable["content"])
        self.keys: NDArray[np.uint64] = (
            self.content.view(">u8").reshape(-1, 2)[:, 0].astype(np.uint64)
        )
        self.sizes = _sizes(usable)
        targets = self._geometry.targets(self.sizes)
        self.resizes = self._geometry.resizes(self.sizes, targets)
        self.buckets: NDArray[np.int32] = targets.astype(np.int32)
        self._enlarged = int((self._geometry.cover_scale(self.sizes, targets) > 1).sum())

    @classmethod
    def open(cls, settings: DatasetSettings, *, index_folder: Path, bus: Bus) -> DataSource:
        """Scan a dataset, looking only at what has changed since the last time.

        Args:
            settings: The dataset's entry, inherited values filled in.
            index_folder: Where the index is kept.
            bus: Told of progress and of what is left out.

        Raises:
            DataError: The folder is missing or holds no picture, too many are unusable, or none
                is left.
        """
        assert settings.instance_data_dir is not None, "checked with the settings"
        index = Index(
            index_folder / f"{safe_name(settings.id)}.parquet",
            LocalStorage(settings.instance_data_dir),
            workers=min(settings.max_workers, os.cpu_count() or 1),
            bus=bus,
            title=f"index {settings.id}",
        )
        table = index.scan(texts=caption_rule(settings).reads_text)
        source = cls(settings, index, table, bus)
        source._tell()
        return source

    def without(self, reasons: Mapping[str, str]) -> DataSource:
        """The dataset without some pictures and their copies, until these files change.

        Args:
            reasons: Why each path cannot be used.

        Raises:
            DataError: Too many are unusable, or none is left.
        """
        table = self._whole
        named = pa.table({"path": list(reasons), "why": list(reasons.values())})
        at = pc.index_in(table["path"], value_set=named["path"].combine_chunks())
        # A copy has the same bytes: what is wrong with one is wrong with all.
        contents = table["content"].filter(pc.is_valid(at)).combine_chunks()
        first = pc.index_in(table["content"], value_set=contents)
        hit = pc.is_valid(first)
        why = named["why"].take(at.filter(pc.is_valid(at))).take(first)
        for name, values in (("status", pa.scalar("reject")), ("reason", why)):
            column = table.schema.get_field_index(name)
            table = table.set_column(column, name, pc.if_else(hit, values, table[name]))
        self._index.save(table)
        return DataSource(self.settings, self._index, table, self._bus)

    def __len__(self) -> int:
        return len(self.keys)

    def path(self, row: int) -> str:
        """The path of a picture inside its dataset."""
        path: str = self._paths[row].as_py()
        return path

    def geometry(self, row: int) -> Geometry:
        """What is done to a picture whose latents are cached: by its content and the dataset."""
        return self._placed(row, key64("crop", bytes(self.content[row]), self.id))

    def captions(self, row: int) -> tuple[str, ...]:
        """The captions a draw chooses from."""
        return self._captions.captions(self.path(row), self._texts[row].as_py())

    def all_captions(self) -> list[str]:
        """Every caption a draw can come with, sorted, each once."""
        found = {""} if self.settings.caption_dropout_probability > 0 else set()
        for start in range(0, len(self), 1 << 16):
            paths = self._paths.slice(start, 1 << 16).to_pylist()
            texts = self._texts.slice(start, 1 << 16).to_pylist()
            for path, text in zip(paths, texts, strict=True):
                found.update(self._captions.captions(path, text))
        return sorted(found)

    def caption_digest(self) -> str:
        """Changes when a picture's captions do, and when they are drawn in another way.

        Pictures count in the order of their content, so that a new folder name changes nothing.
        """
        order = pa.array(np.lexsort((np.arange(len(self)), self.keys)))
        digest = blake2b(digest_size=16)
        columns = [self._texts]
        if self.settings.caption_strategy == "filename":
            columns.append(pc.replace_substring_regex(self._paths, r"^.*/|\.[^.]*$", ""))
        for column in columns:
            for text in column.take(order).to_pylist():
                digest.update(repr(text).encode())
        told = self.settings.model_dump(mode="json", include=_CAPTION_SETTINGS)
        digest.update(repr(sorted(told.items())).encode())
        return digest.hexdigest()

    def identity(self) -> dict[str, str]:
        """What, beside contents and sizes, decides what is learned of the pictures, by name."""
        settings = self.settings
        width, height = self.resizes[:, 0], self.resizes[:, 1]
        order = np.lexsort((height, width, self.keys))
        cuts = bool((self.resizes > self.buckets).any())
        return {
            "captions": self.caption_digest(),
            "resizes": f"{key64(self.resizes[order].astype('<i8').tobytes()):016x}",
            "crop_style": settings.crop_style if cuts else "without effect",
            "image_background": settings.image_background.lower(),
            "vae_cache_disable": str(settings.vae_cache_disable).lower(),
        }

    def sample(self, row: int, epoch: int, occurrence: int, seeds: Seeds) -> Sample:
        """One draw of a picture; depends on its content and the draw, not on its row or rank."""
        content = bytes(self.content[row])
        draw = (content, self.id, epoch, occurrence)
        captions = self.captions(row)
        caption = captions[int(seeds.uniform("caption", *draw) * len(captions))]
        if seeds.uniform("caption dropout", *draw) < self.settings.caption_dropout_probability:
            caption = ""
        fresh = self.settings.vae_cache_disable
        return Sample(
            id=content.hex(),
            dataset=self.id,
            path=self.path(row),
            caption=caption,
            geometry=self._placed(row, seeds.key("crop", *draw)) if fresh else self.geometry(row),
            occurrence=occurrence,
        )

    def pixels(self, drawn: Sample | int) -> NDArray[np.uint8]:
        """What the encoder sees of a draw, or of a row by its cached geometry.

        Returns:
            [H, W, 3] uint8 sRGB.

        Raises:
            PictureError: The file cannot be read or decoded.
            DataError: It is not the file that was indexed.
        """
        if isinstance(drawn, Sample):
            path, geometry, content = drawn.path, drawn.geometry, drawn.id
        else:
            path, geometry = self.path(drawn), self.geometry(drawn)
            content = bytes(self.content[drawn]).hex()
        where = f"dataset {self.id}: {path}"
        try:
            data = self._index.storage.read(path)
        except OSError as error:
            raise PictureError(f"cannot be read: {error.strerror or error}", where) from error
        if blake2b(data, digest_size=16).hexdigest() != content:
            raise DataError(
                f"{where} was changed after it was indexed",
                fix="start again; if this comes back, touch the file and start again",
            )
        try:
            return render(decode(data, background(self.settings)), geometry)
        except PictureError as error:
            raise PictureError(error.reason, where) from error

    def _placed(self, row: int, key: int) -> Geometry:
        source, resize, target = (
            (int(size[row, 0]), int(size[row, 1]))
            for size in (self.sizes, self.resizes, self.buckets)
        )
        return self._geometry.place(source, resize, target, key)

    def _sound(self, table: pa.Table) -> tuple[pa.Table, dict[str, str]]:
        """The rows that can be read and have a caption, and the reasons of the others."""
        folder = self._index.storage.title
        if not len(table):
            looked = " ".join(sorted(PICTURE_SUFFIXES))
            raise DataError(
                f"dataset {self.id}: there are no pictures in {folder} (looked for {looked})",
                fix="correct instance_data_dir",
            )
        fault = pc.not_equal(table["status"], "ok")
        if self._captions.reads_text:
            fault = pc.or_(fault, pc.is_null(table["caption"]))
        faulty = table.filter(fault)
        reasons = pc.coalesce(faulty["reason"], faulty["caption_reason"], pa.scalar(NO_CAPTION))
        rejects = dict(zip(faulty["path"].to_pylist(), reasons.to_pylist(), strict=True))
        few, share = FAULTS_ALLOWED
        allowed = self.settings.allow_excluded or len(rejects) <= max(few, share * len(table))
        if len(rejects) < len(table) and not allowed:
            raise DataError(
                f"dataset {self.id}: {len(rejects)} of {len(table)} pictures cannot be used\n"
                + _listed(rejects),
                fix="mend or remove them, or set allow_excluded to train on the others",
            )
        return table.filter(pc.invert(fault)), rejects

    def _wanted(self, sound: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        """The rows the user's filters leave, and how many each took."""
        sizes = _sizes(sound)
        keep = np.ones(len(sound), np.bool_)
        taken: dict[str, int] = {}
        for name, out in size_filter(self.settings).left_out(sizes).items():
            taken[name] = int((out & keep).sum())
            keep &= ~out
        if not keep.any():
            lines = [f"{len(sound) + len(self.rejects)} pictures found"]
            lines += [f"{len(self.rejects)} cannot be used"] * bool(self.rejects)
            lines += [f"{count} left out by {name}" for name, count in taken.items()]
            text = "\n".join(f"  {line}" for line in [*lines, "0 left"])
            listed = f"\n{_listed(self.rejects)}" if self.rejects else ""
            raise DataError(f"dataset {self.id}: nothing is left to train on\n{text}{listed}")
        return sound.filter(pa.array(keep)), {name: n for name, n in taken.items() if n}

    def _tell(self) -> None:
        """Say what was found, what was left out and why."""
        say, name, count = self._bus.notice, f"dataset {self.id}", len(self)
        say(f"{name}: {_pictures(count)} in {buckets.describe(self.buckets)}")
        if self.rejects:
            say(
                f"{name}: {_pictures(len(self.rejects))} cannot be used\n{_listed(self.rejects)}",
                "warning",
            )
        for setting, taken in self.left_out.items():
            say(f"{name}: {_pictures(taken)} left out by {setting}")
        if self._enlarged:
            say(f"{name}: {self._enlarged} of {_pictures(count)} enlarged to reach their size")
        twins = count - len(np.unique(self.content))
        if twins:
            say(f"{name}: {_pictures(twins)} with exactly the bytes of another", "warning")


_CAPTION_SETTINGS = {
    "caption_dropout_probability",
    "caption_strategy",
    "disable_multiline_split",
    "instance_prompt",
    "only_instance_prompt",
    "prepend_instance_prompt",
}


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"


def _listed(reasons: Mapping[str, str]) -> str:
    """The first reasons, a line each."""
    lines = [f"  {path}: {reason}" for path, reason in list(reasons.items())[:FAULTS_LISTED]]
    if len(reasons) > FAULTS_LISTED:
        lines.append(f"  and {len(reasons) - FAULTS_LISTED} more")
    return "\n".join(lines)


def _sizes(table: pa.Table) -> Sizes:
    columns = [table[name].to_numpy().astype(np.int64) for name in ("width", "height")]
    return np.stack(columns, axis=1)


def _bytes16(column: pa.ChunkedArray) -> NDArray[np.void]:
    """[n] void of 16 bytes: numpy's own byte strings would lose zeros at the end."""
    packed = column.combine_chunks()
    data = np.frombuffer(packed.buffers()[1], "V16")
    found: NDArray[np.void] = data[packed.offset : packed.offset + len(packed)]
    return found
