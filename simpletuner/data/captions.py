"""Captions: where they come from, and how the bytes of a text file become them."""

from __future__ import annotations

from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from string import whitespace
from typing import NamedTuple
from unicodedata import normalize
from urllib.parse import unquote

from simpletuner.core.table import Row, Table
from simpletuner.data.caption_edits import CaptionFilter, TagShuffle, Trigger, surrounded
from simpletuner.data.storage.web import SCHEMES

_NO_WIDTH = "\ufeff\u200b"
"""Characters that nobody sees: a mark in the wrong place, and a place to break a word."""

SEPARATOR = "\x1e"
"""Stands between the captions that a row of a table has, in the one text that is kept of them."""


class CaptionSource(NamedTuple):
    """What a strategy may make captions of.

    Args:
        path: The picture's path inside its dataset.
        text: What its text file or its row in the table says, or the default caption; None
            without any.
        prompts: The dataset's instance prompts.
        multiline: Each line of a text is a caption of its own.
    """

    path: str
    text: str | None
    prompts: tuple[str, ...]
    multiline: bool


def from_filename(source: CaptionSource) -> tuple[str, ...]:
    """The file's name without its ending, underscores read as blanks; of an address, its path's."""
    path = source.path
    if path.startswith(SCHEMES):
        path = unquote(path.partition("?")[0].partition("#")[0])
    return (normalize("NFC", PurePosixPath(path).stem.replace("_", " ")).strip(),)


def from_textfile(source: CaptionSource) -> tuple[str, ...]:
    """The text beside the picture: its lines are alternatives; an empty one is the caption ""."""
    text = source.text or ""
    if not source.multiline or "\n" not in text:
        return (text.strip(),)
    lines = tuple(line.strip() for line in text.split("\n") if line.strip())
    return lines or ("",)


def from_table(source: CaptionSource) -> tuple[str, ...]:
    """What the picture's row says; a line feed is part of a caption."""
    return tuple((source.text or "").split(SEPARATOR))


def from_instance_prompt(source: CaptionSource) -> tuple[str, ...]:
    """The instance prompts, as alternatives."""
    return source.prompts


CAPTION_STRATEGIES = Table(
    "caption strategy",
    (
        Row("filename", from_filename, "The file's name, underscores read as blanks."),
        Row(
            "textfile",
            from_textfile,
            "The .txt file beside the picture; its lines are alternatives.",
            facts={"reads_text": True},
        ),
        Row(
            "instanceprompt",
            from_instance_prompt,
            "The instance prompt for every picture.",
            facts={"is_prompt": True},
        ),
        *(
            Row(
                name,
                from_table,
                f"A column of the dataset's table, a {title} one or of another format.",
                facts={"reads_table": True},
            )
            for name, title in (
                ("parquet", "Parquet"),
                ("csv", "CSV"),
                ("json", "JSON"),
                ("jsonl", "JSON lines"),
            )
        ),
        Row("huggingface", None, "A column of a dataset on the Hugging Face hub."),
        Row("webshart", None, "The captions inside tar shards."),
    ),
)
"""Where captions come from, by the name the user writes."""


@dataclass(frozen=True)
class CaptionRule:
    """How the captions of one dataset are made; pure, from a path and a text.

    Args:
        strategy: A row of CAPTION_STRATEGIES.
        prompts: Instance prompts.
        prepend: Put an instance prompt and a blank before every caption.
        multiline: Each line of a text is a caption of its own.
        default: The text of pictures that have none.
        filters: Applied to each caption as it was read, one after the other.
        shuffle: Makes several captions of one; what stands before and after stays there.
        prefix: Stands before every caption.
        suffix: Stands after every caption.
        trigger: Put in last, so that it may stand in prompts, prefix and suffix too.
    """

    strategy: Row
    prompts: tuple[str, ...] = ()
    prepend: bool = False
    multiline: bool = True
    default: str | None = None
    filters: tuple[CaptionFilter, ...] = ()
    shuffle: TagShuffle | None = None
    prefix: str = ""
    suffix: str = ""
    trigger: Trigger | None = None

    @property
    def reads_text(self) -> bool:
        """True if pictures have text files beside them."""
        return bool(self.strategy.fact("reads_text", False))

    @property
    def prompts_alone(self) -> bool:
        """True if every picture has the same captions."""
        return bool(self.strategy.fact("is_prompt", False))

    @property
    def reads_table(self) -> bool:
        """True if captions stand in the dataset's table."""
        return bool(self.strategy.fact("reads_table", False))

    @property
    def has_texts(self) -> bool:
        """True if each picture has a text of its own."""
        return self.reads_text or self.reads_table

    @property
    def needs_text(self) -> bool:
        """True if a picture without a text of its own has no caption."""
        return self.has_texts and self.default is None

    def captions(self, path: str, text: str | None) -> tuple[str, ...]:
        """The alternatives for one picture, at least one, each once, in a stable order."""
        text = self.default if text is None else text
        source = CaptionSource(path, text, self.prompts, self.multiline)
        made: Iterable[str] = self.strategy.load()(source)
        if self.filters:
            # A line of which nothing is left is no alternative, unless it was the only one.
            made = [each for each in map(self._filtered, made) if each] or [""]
        if self.shuffle:
            made = [variant for caption in made for variant in self.shuffle(caption)]
        if self.prepend:
            made = [f"{prompt} {caption}".strip() for prompt in self.prompts for caption in made]
        if self.prefix or self.suffix:
            made = [surrounded(self.prefix, caption, self.suffix) for caption in made]
        if self.trigger:
            made = map(self.trigger, made)
        return tuple(dict.fromkeys(made))

    def _filtered(self, caption: str) -> str:
        for each in self.filters:
            caption = each(caption)
        return caption.strip()


def text_key(path: str) -> str:
    """The path of the text file that belongs to the picture at `path`."""
    return str(PurePosixPath(path).with_suffix(".txt"))


def other_text_keys(key: str) -> tuple[str, ...]:
    """How else the file at `text_key` may be written: its accents, or its ending."""
    forms = dict.fromkeys((key, normalize("NFC", key), normalize("NFD", key)))
    upper = [f"{form.removesuffix('.txt')}.TXT" for form in forms]
    return (*list(forms)[1:], *upper)


def folder_text_key(path: str) -> str:
    """The path of the text file that holds for all pictures of a folder without one of their own.

    Args:
        path: Of a picture or a text file in that folder.
    """
    return str(PurePosixPath(path).with_name("default.txt"))


def clean(text: str) -> str:
    """Composed characters (NFC), bare line feeds, nothing blank around."""
    text = normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    return text.strip(f"{_NO_WIDTH}{whitespace}")


def decode_text(data: bytes) -> tuple[str, str] | None:
    """The cleaned text of a caption file and its encoding; None if there is no telling.

    UTF-8 with or without a mark, UTF-16 with one, else cp1252. None of these holds NUL, which
    UTF-16 without a mark does.
    """
    for mark, encoding in (
        (BOM_UTF8, "utf-8-sig"),
        (BOM_UTF16_LE, "utf-16"),
        (BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            return _decode(data, encoding)
    return _decode(data, "utf-8") or _decode(data, "cp1252")


def _decode(data: bytes, encoding: str) -> tuple[str, str] | None:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else (clean(text), encoding)
