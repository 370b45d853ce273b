"""One dataset, ready to be drawn from: who is usable, what is done to each, what it is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from simpletuner.core.events import Bus
from simpletuner.core.files import safe_name
from simpletuner.core.seeds import Seeds, key64
from simpletuner.core.types import Geometry, Sample
from simpletuner.data.beside import Beside
from simpletuner.data.caption_edits import PLACEHOLDER
from simpletuner.data.caption_settings import DatasetCaptionSettings
from simpletuner.data.choice import choose
from simpletuner.data.columns import bytes16, keys_of, sizes_of
from simpletuner.data.control import ControlPictures, asked_for
from simpletuner.data.excluded import Excluded, listed, pictures
from simpletuner.data.files import open_files
from simpletuner.data.index import Index, marked
from simpletuner.data.paired import Paired
from simpletuner.data.permutation import mix
from simpletuner.data.pixels import (
    PictureError,
    decode,
    opacity,
    render,
    render_beside,
    render_mask,
)
from simpletuner.data.rules import background, caption_rule, sizing, trigger_is_nowhere
from simpletuner.data.settings import DatasetSettings


class DataSource:
    """The n usable pictures of one dataset; rows are numbered in the order of their paths.

    Build it with `open`.

    Attributes:
        id: The dataset's name.
        settings: Its settings.
        repeats: Further passes within an epoch.
        probability: How often it is drawn from, beside the other datasets.
        train_batch_size: Its own samples of one micro-batch on one rank; None for the run's.
        span: The part of the run in which it is drawn from.
        content: [n] void of 16 bytes, the digest of each file; ``bytes(content[row])``.
        keys: [n] u64, the first 8 bytes of `content`.
        sizes: [n, 2] int32 upright size of each file.
        resizes: [n, 2] int32 its size after the one resize.
        buckets: [n, 2] int32 width and height that is encoded.
        rejects: Reason by path of the pictures that cannot be used.
        left_out: What each of the user's filters took, by its setting.
        enlarged: How many are smaller than the size they are trained at.
        merged: How many were moved out of a rare bucket into a fuller one.
        masked: They have masks.
    """

    def __init__(
        self,
        settings: DatasetSettings,
        index: Index,
        table: pa.Table,
        batch: int,
        bus: Bus,
        paired: Sequence[Paired] = (),
        unlisted: Excluded | None = None,
    ) -> None:
        self.settings = settings
        self.id = settings.id
        self.repeats = settings.repeats
        self.probability = settings.probability
        self.train_batch_size = settings.train_batch_size
        self.span = settings.span
        self._index = index
        self._whole = table
        self._batch = batch
        self._bus = bus
        self._captions = caption_rule(settings)
        self._sizing = sizing(settings, batch)
        self._geometry = self._sizing.rule
        self._beside = Beside(paired, table)
        self.masked = settings.alpha_as_mask or self._beside.masks is not None
        chosen = choose(settings, self._beside, self._captions, self._sizing, index.storage.title)
        usable, targets = chosen.usable, chosen.targets
        self.rejects, self.left_out = chosen.rejects, chosen.left_out
        self._unlisted = unlisted
        if unlisted is not None:
            self.left_out = {unlisted.reason: unlisted, **self.left_out}
        self._paths, self._texts = usable["path"], usable["caption"]
        self._beside.take(usable)
        self._with_alpha, self._with_frames = (
            pc.sum(usable[name]).as_py() or 0 for name in ("alpha", "frames")
        )
        self.content = bytes16(usable["content"])
        self.keys = keys_of(self.content)
        sizes = sizes_of(usable)
        own, targets = targets, self._sizing.merged(sizes, targets)
        self.merged = int((own != targets).any(axis=1).sum())
        self.enlarged = int((self._geometry.cover_scale(sizes, targets) > 1).sum())
        self.sizes: NDArray[np.int32] = sizes.astype(np.int32)
        self.resizes: NDArray[np.int32] = self._geometry.resizes(sizes, targets).astype(np.int32)
        self.buckets: NDArray[np.int32] = targets.astype(np.int32)

    @classmethod
    def open(
        cls,
        settings: DatasetSettings,
        *,
        index_folder: Path,
        train_batch_size: int = 1,
        paired: Sequence[DatasetSettings] = (),
        index_name: str | None = None,
        bus: Bus,
    ) -> DataSource:
        """Scan a dataset, looking only at what has changed since the last time.

        Args:
            settings: The dataset's entry, inherited values filled in.
            index_folder: Where the index is kept.
            train_batch_size: Of the run, for a dataset that does not say: what a bucket with fewer
                pictures is rare by.
            paired: The entries of what goes with its pictures.
            index_name: What its index is called, if it shares it with another dataset of the same
                files.
            bus: Told of progress and of what is left out.

        Raises:
            DataError: The folder is missing or holds no picture, too many are unusable, one lacks
                what goes with it, or none is left.
        """
        files = open_files(settings, downloads=index_folder / "downloads", bus=bus)
        index = Index(
            index_folder / f"{safe_name(index_name or settings.id)}.parquet",
            files.storage,
            workers=files.workers,
            bus=bus,
            title=f"index {settings.id}",
        )
        rule = caption_rule(settings)
        told = files.table.captions_of if files.table and rule.reads_table else None
        table = index.scan(texts=rule.reads_text, told=told)
        unlisted = None
        if files.unlisted:
            unlisted = Excluded("metadata_backend", files.unlisted, files.example)
        found = [Paired.open(each, index_folder=index_folder, bus=bus) for each in paired]
        source = cls(settings, index, table, train_batch_size, bus, found, unlisted)
        if files.table is not None:
            files.table.tell_other_sizes(table, bus)
        source._tell()
        return source

    def without(self, reasons: Mapping[str, str]) -> DataSource:
        """The dataset without some pictures and their copies, until these files change.

        Args:
            reasons: Why each path cannot be used.

        Raises:
            DataError: Too many are unusable, or none is left.
        """
        table = self.remember(reasons)
        rest = (self._batch, self._bus, self._beside.sets, self._unlisted)
        return DataSource(self.settings, self._index, table, *rest)

    def with_whole_pairs(self) -> DataSource:
        """The dataset without the pictures whose masks and the like turn out not to be decodable.

        A file is decoded once; what is found is kept in its index until it changes.

        Returns:
            The dataset itself if all of them are whole. Else others may have come in, whose files
            are still to be decoded.

        Raises:
            DataError: One cannot be decoded and allow_excluded is not set, or it is not the file
                that was indexed.
        """
        paired = self._beside.decoded()
        if all(new is old for new, old in zip(paired, self._beside.sets, strict=True)):
            return self
        rest = (self._batch, self._bus, paired, self._unlisted)
        return DataSource(self.settings, self._index, self._whole, *rest)

    def remember(self, reasons: Mapping[str, str]) -> pa.Table:
        """Keep in the index why pictures and their copies cannot be used, until they change.

        Args:
            reasons: By path.

        Returns:
            The whole table, with these marked.
        """
        table = self._marked(self._whole, reasons)
        # Another resolution of the same files may have found something since.
        saved, files = self._index.load(), ["path", "content"]
        if saved.select(files).equals(table.select(files)):
            self._index.save(self._marked(saved, reasons))
        else:
            self._index.save(table)
        return table

    def _marked(self, table: pa.Table, reasons: Mapping[str, str]) -> pa.Table:
        named = pa.table({"path": list(reasons), "why": list(reasons.values())})
        at = pc.index_in(table["path"], value_set=named["path"].combine_chunks())
        # A copy has the same bytes: what is wrong with one is wrong with all.
        contents = table["content"].filter(pc.is_valid(at)).combine_chunks()
        first = pc.index_in(table["content"], value_set=contents)
        hit = pc.is_valid(first)
        why = named["why"].take(at.filter(pc.is_valid(at))).take(first)
        return marked(table, hit, pa.scalar("reject"), why)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def found(self) -> int:
        """Pictures in the folder, usable or not."""
        return len(self._whole) + (self._unlisted.count if self._unlisted else 0)

    def damaged(self) -> dict[str, str]:
        """Reason by path of the files that cannot be read or decoded, as far as is known."""
        faulty = self._whole.filter(pc.equal(self._whole["status"], "reject"))
        paths, reasons = (faulty[name].to_pylist() for name in ("path", "reason"))
        return dict(zip(paths, reasons, strict=True))

    def excluded(self) -> tuple[Excluded, ...]:
        """Why pictures are not trained on: faults, the most frequent first, then filters."""
        first: dict[str, str] = {}
        for path, reason in self.rejects.items():
            first.setdefault(reason, path)
        faults = Counter(self.rejects.values()).most_common()
        named = (Excluded(reason, count, first[reason]) for reason, count in faults)
        return (*named, *self.left_out.values())

    def path(self, row: int) -> str:
        """The path of a picture inside its dataset."""
        path: str = self._paths[row].as_py()
        return path

    def geometry(self, row: int) -> Geometry:
        """What is done to a picture whose latents are cached: by its content and the dataset."""
        (key,) = mix(self.keys[row : row + 1], key64("crop", self.id)).tolist()
        return self._placed(row, key)

    def boxes(self) -> NDArray[np.int32]:
        """[n, 9] the numbers of each `geometry`, in the order of its fields."""
        slack = self.resizes.astype(np.int64) - self.buckets
        offsets = self._geometry.offsets(slack, mix(self.keys, key64("crop", self.id)))
        unflipped = np.zeros((len(self), 1), np.int32)
        parts = (self.sizes, self.resizes, offsets.astype(np.int32), self.buckets, unflipped)
        return np.concatenate(parts, axis=1)

    def captions(self, row: int) -> tuple[str, ...]:
        """The captions a draw chooses from."""
        return self._captions.captions(self.path(row), self._texts[row].as_py())

    def all_captions(self) -> set[str]:
        """Every caption a draw can come with."""
        found = {""} if self.settings.caption_dropout_probability > 0 else set()
        for start in range(0, len(self), 1 << 16):
            paths = self._paths.slice(start, 1 << 16).to_pylist()
            texts = self._texts.slice(start, 1 << 16).to_pylist()
            for path, text in zip(paths, texts, strict=True):
                found.update(self._captions.captions(path, text))
        return found

    def caption_digest(self) -> str:
        """Changes when a picture's captions do, and when they are drawn in another way.

        Pictures count in the order of their content, so that a new folder name changes nothing.
        """
        order = pa.array(np.argsort(self.keys, kind="stable"))
        digest = blake2b(digest_size=16)
        columns = [self._texts]
        if self.settings.caption_strategy == "filename":
            columns.append(pc.replace_substring_regex(self._paths, r"^.*/|\.[^.]*$", ""))
        for column in columns:
            ordered = column.take(order)
            for start in range(0, len(ordered), 1 << 16):
                digest.update(repr(ordered.slice(start, 1 << 16).to_pylist()).encode())
        rule = self._captions
        idle = {"caption_shuffle"} if rule.shuffle is None else set()
        if not rule.prompts_alone and not rule.prepend:
            idle |= {"instance_prompt", "only_instance_prompt", "prepend_instance_prompt"}
        if not rule.has_texts or not self._texts.null_count:
            idle.add("default_caption")
        told = self.settings.model_dump(mode="json", include=_CAPTION_SETTINGS - idle)
        if self._captions.reads_table:  # one kind of table is as good as another
            told["caption_strategy"] = "table"
        digest.update(repr(sorted(told.items())).encode())
        pa.default_memory_pool().release_unused()  # what the columns took in another order
        return digest.hexdigest()

    def identity(self) -> dict[str, str]:
        """What, beside contents and sizes, decides what is learned of the pictures, by name."""
        settings = self.settings
        width, height = self.resizes[:, 0], self.resizes[:, 1]
        order = np.lexsort((height, width, self.keys))
        cuts = bool((self.resizes > self.buckets).any())
        facts = {
            "captions": self.caption_digest(),
            "resizes": f"{key64(self.resizes[order].astype('<i8').tobytes()):016x}",
            "crop_style": settings.crop_style if cuts else "without effect",
            "image_background": settings.image_background.lower(),
            "vae_cache_disable": str(settings.vae_cache_disable).lower(),
            "is_regularisation_data": str(settings.is_regularisation_data).lower(),
            "masks": "alpha" if settings.alpha_as_mask else "none",
            "masked_loss_probability": (
                f"{settings.masked_loss_probability:g}" if self.masked else "without effect"
            ),
        }
        if settings.timestep_sampling_offset:
            facts["timestep_sampling_offset"] = f"{settings.timestep_sampling_offset:g}"
        facts |= self._beside.digests(self.keys)
        return facts

    def sample(self, row: int, epoch: int, occurrence: int, seeds: Seeds) -> Sample:
        """One draw of a picture; depends on its content and the draw, not on its row or rank."""
        content = bytes(self.content[row])
        draw = (content, self.id, epoch, occurrence)
        captions = self.captions(row)
        caption = captions[int(seeds.uniform("caption", *draw) * len(captions))]
        if seeds.uniform("caption dropout", *draw) < self.settings.caption_dropout_probability:
            caption = ""
        chance = self.settings.masked_loss_probability
        fresh = self.settings.vae_cache_disable
        return Sample(
            id=content.hex(),
            dataset=self.id,
            path=self.path(row),
            caption=caption,
            geometry=self._placed(row, seeds.key("crop", *draw)) if fresh else self.geometry(row),
            occurrence=occurrence,
            masked=self.masked and seeds.uniform("masked loss", *draw) < chance,
            regularises=self.settings.is_regularisation_data,
            timestep_offset=self.settings.timestep_sampling_offset,
        )

    def pixels(self, drawn: Sample | int) -> NDArray[np.uint8]:
        """What the encoder sees of a draw, or of a row by its cached geometry.

        Returns:
            [H, W, 3] uint8 sRGB.

        Raises:
            PictureError: The file cannot be read or decoded.
            DataError: It is not the file that was indexed.
        """
        path, content, geometry = asked_for(self, drawn)
        picture = self._decoded(path, content)
        try:
            return render(picture, geometry)
        except PictureError as error:
            raise PictureError(error.reason, f"dataset {self.id}: {path}") from error

    def picture(self, row: int) -> Image.Image:
        """A whole picture, upright and flattened, before its resize.

        Raises:
            PictureError: The file cannot be read or decoded.
            DataError: It is not the file that was indexed.
        """
        return self._decoded(self.path(row), bytes(self.content[row]).hex())

    def mask(self, row: int, geometry: Geometry) -> NDArray[np.uint8]:
        """How much of each pixel of a picture with a mask is learned.

        Args:
            row: Of the picture.
            geometry: Of its draw.

        Returns:
            [H, W] uint8, 255 for all of it, 0 for nothing.

        Raises:
            PictureError: The mask cannot be read or decoded.
            DataError: It is not the file that was indexed.
        """
        if (masks := self._beside.masks) is not None:
            return render_mask(self._beside.image(masks, row), geometry)
        path, content = self.path(row), bytes(self.content[row]).hex()
        return render_mask(self._decoded(path, content, opacity), geometry)

    def mask_contents(self, rows: NDArray[np.int64]) -> NDArray[np.void]:
        """[k] void of 16 bytes, the digests of the files that hold the masks of some pictures."""
        masks = self._beside.masks
        return self.content[rows] if masks is None else self._beside.contents(masks, rows)

    @property
    def controls(self) -> ControlPictures | None:
        """The control pictures that go with these, one for each."""
        paired = self._beside.control
        return None if paired is None else ControlPictures(self, self._beside, paired)

    @property
    def conditions(self) -> tuple[tuple[str, str], ...]:
        """The id and conditioning_type of each set of pictures that goes with these."""
        return tuple((each.id, each.kind) for each in self._beside.sets if each.kind != "mask")

    def condition(self, name: str, row: int, geometry: Geometry) -> NDArray[np.uint8]:
        """The picture of one of `conditions` that goes with a picture.

        Args:
            name: The id of the set.
            row: Of the picture.
            geometry: Of its draw; a loose reference has its own, by the rule of this dataset.

        Returns:
            [H, W, 3] uint8 sRGB.

        Raises:
            PictureError: It cannot be read or decoded.
            DataError: It is not the file that was indexed.
        """
        each = next(each for each in self._beside.sets if each.id == name)
        image = self._beside.image(each, row)
        if each.kind == "reference_loose":
            geometry = self._own_geometry(image.size, key64("crop", bytes(self.content[row]), name))
        return render_beside(image, geometry)

    def _own_geometry(self, size: tuple[int, int], key: int) -> Geometry:
        sizes = np.array([size], np.int64)
        (target,) = self._sizing.targets(sizes, np.array([key], np.uint64))
        (resize,) = self._geometry.resizes(sizes, target[None])
        return self._geometry.place(size, tuple(resize.tolist()), tuple(target.tolist()), key)

    def _decoded(
        self, path: str, content: str, take: Callable[[bytes], Image.Image] | None = None
    ) -> Image.Image:
        where = f"dataset {self.id}: {path}"
        data = self._index.read(path, content, where)
        try:
            return take(data) if take else decode(data, background(self.settings))
        except PictureError as error:
            raise PictureError(error.reason, where) from error

    def _placed(self, row: int, key: int) -> Geometry:
        source, resize, target = (
            (int(size[row, 0]), int(size[row, 1]))
            for size in (self.sizes, self.resizes, self.buckets)
        )
        return self._geometry.place(source, resize, target, key)

    def _captions_with_placeholder(self) -> int:
        """Texts that hold the place of a trigger word where there is none."""
        if not self._captions.has_texts or self.settings.trigger_word:
            return 0
        return pc.sum(pc.match_substring(self._texts, PLACEHOLDER)).as_py() or 0

    def _tell(self) -> None:
        """Say what is odd; the dataset report counts the rest."""
        say, name, count = self._bus.notice, f"dataset {self.id}", len(self)
        if self.rejects:
            say(
                f"{name}: {pictures(len(self.rejects))} cannot be used\n{listed(self.rejects)}",
                "warning",
            )
        if alone := self._beside.alone(self.id):
            say("\n".join([f"{name}: {alone[0]}", *alone[1:]]), "warning")
        if self._captions.has_texts and self._texts.null_count:
            without = pictures(self._texts.null_count)
            where = "a text file" if self._captions.reads_text else "a caption in the table"
            say(f"{name}: {without} without {where}, captioned by default_caption")
        held = self._captions_with_placeholder()
        if held:
            what = "caption holds" if held == 1 else "captions hold"
            say(f"{name}: {held} {what} {PLACEHOLDER} and there is no trigger_word", "warning")
        texts = self._texts if self._captions.has_texts else self._paths
        if trigger_is_nowhere(self.settings, texts):
            word = self.settings.trigger_word
            say(
                f"{name}: no caption holds the trigger_word {word}, nor {PLACEHOLDER} in its place;"
                f" write {PLACEHOLDER} into captions, or set prepend_trigger_word",
                "warning",
            )
        if self._with_frames:
            some = pictures(self._with_frames)
            say(
                f"{name}: {some} with several frames or pages, of which the first is used",
                "warning",
            )
        if self._with_alpha and not self.settings.alpha_as_mask:
            ground = f"image_background {self.settings.image_background}"
            say(f"{name}: {pictures(self._with_alpha)} with an alpha channel, laid on {ground}")
        twins = count - len(np.unique(self.content))
        if twins:
            say(f"{name}: {pictures(twins)} with exactly the bytes of another", "warning")


_CAPTION_SETTINGS = set(DatasetCaptionSettings.model_fields)
