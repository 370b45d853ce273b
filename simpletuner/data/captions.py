"""Captions: where they come from, and how the bytes of a text file become them."""

from __future__ import annotations

from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from dataclasses import dataclass
from pathlib import PurePosixPath
from unicodedata import normalize

from simpletuner.core.table import Row, Table


@dataclass(frozen=True)
class CaptionSource:
    """What a strategy may make captions of.

    Args:
        path: The picture's path inside its dataset.
        text: What stands in the text file beside it, None without one.
        prompts: The dataset's instance prompts.
        multiline: Each line of a text is a caption of its own.
    """

    path: str
    text: str | None
    prompts: tuple[str, ...]
    multiline: bool


def from_filename(source: CaptionSource) -> tuple[str, ...]:
    """The file's name without its ending, underscores read as blanks."""
    return (normalize("NFC", PurePosixPath(source.path).stem.replace("_", " ")).strip(),)


def from_textfile(source: CaptionSource) -> tuple[str, ...]:
    """The text beside the picture: its lines are alternatives; an empty one is the caption ""."""
    text = source.text or ""
    if not source.multiline:
        return (text.strip(),)
    lines = tuple(line.strip() for line in text.split("\n") if line.strip())
    return lines or ("",)


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
        Row("parquet", None, "A column of a Parquet table."),
        Row("csv", None, "A column of a CSV table."),
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
    """

    strategy: Row
    prompts: tuple[str, ...] = ()
    prepend: bool = False
    multiline: bool = True

    @property
    def reads_text(self) -> bool:
        """True if every picture needs a text file beside it."""
        return bool(self.strategy.fact("reads_text", False))

    def captions(self, path: str, text: str | None) -> tuple[str, ...]:
        """The alternatives for one picture, at least one, each once, in a stable order."""
        source = CaptionSource(path, text, self.prompts, self.multiline)
        made: tuple[str, ...] = self.strategy.load()(source)
        if self.prepend:
            made = tuple(
                f"{prompt} {caption}".strip() for prompt in self.prompts for caption in made
            )
        return tuple(dict.fromkeys(made))


def text_key(path: str) -> str:
    """The path of the text file that belongs to the picture at `path`."""
    return str(PurePosixPath(path).with_suffix(".txt"))


def clean(text: str) -> str:
    """Composed characters (NFC), bare line feeds, no blanks around."""
    return normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).strip()


def decode_text(data: bytes) -> tuple[str, str] | None:
    """The cleaned text of a caption file and its encoding; None if there is no telling.

    UTF-8 with or without a mark, UTF-16 with one, else cp1252.
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
        return clean(data.decode(encoding)), encoding
    except UnicodeDecodeError:
        return None
