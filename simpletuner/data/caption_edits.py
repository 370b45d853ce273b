"""What is done to captions once they are read: filters, tag shuffles, trigger words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import shake_128
from struct import unpack
from types import MappingProxyType

from simpletuner.core.seeds import key64

_REPLACEMENT = re.compile(r"s/((?:[^/\\]|\\.)+)/((?:[^/\\]|\\.)*)(?:/(g?))?", re.DOTALL)


@dataclass(frozen=True)
class CaptionFilter:
    """One entry of caption_filter_list.

    Args:
        search: What is looked for; plain text is an expression that finds itself.
        replace: What is put in its place, as ``re.sub`` takes it.
        most: So many finds in a caption are replaced; 0 is all of them.
    """

    search: re.Pattern[str]
    replace: str = ""
    most: int = 0

    @classmethod
    def of(cls, entry: str) -> CaptionFilter:
        """The filter that `entry` describes.

        Either a regular expression, removed wherever it is found, or ``s/search/replace/``, which
        changes the first find, with a ``g`` behind it every one. The last slash may be missing.

        Raises:
            ValueError: It is neither; says why.
        """
        if not entry.startswith("s/"):
            return cls(_expression(entry))
        parts = _REPLACEMENT.fullmatch(entry)
        if parts is None:
            raise ValueError(f"{entry!r} is not of the form s/search/replace/")
        search, replace, every = parts.groups()
        made = cls(_expression(search), replace.replace(r"\/", "/"), 0 if every else 1)
        try:
            # An empty alternative is always found, so that the replacement is looked at.
            re.sub(f"{search}|", made.replace, "")
        except (re.error, IndexError) as error:
            raise ValueError(f"{entry!r} cannot replace: {error}") from error
        return made

    def __call__(self, caption: str) -> str:
        """`caption` after the filter."""
        return self.search.sub(self.replace, caption, count=self.most)


def _expression(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(
            f"{text!r} is not a regular expression: {error}; a backslash before one of"
            r" \ . ^ $ * + ? { } [ ] | ( ) takes it as it stands"
        ) from error


_SEPARATORS = MappingProxyType(
    {
        "comma": (re.compile(","), ", "),
        "space": (re.compile(r"\s+"), " "),
        "period": (re.compile(r"\.(?:\s+|$)"), ". "),
    }
)
"""What stands between tags by the name the user writes, and what they are joined by again."""


@dataclass(frozen=True)
class TagShuffle:
    """Other orders of a caption's tags, always the same ones.

    Args:
        count: How many orders are drawn.
        seed: Draws them, together with the caption.
        split_on: ``comma``, ``space`` or ``period``.
        keep: So many tags stay at the start.
        original: The caption as it was is one of the results.
    """

    count: int
    seed: int
    split_on: str = "comma"
    keep: int = 0
    original: bool = True

    def __call__(self, caption: str) -> Iterator[str]:
        """The variants of `caption`, some perhaps twice; itself where there is nothing to move."""
        separator, mark = _SEPARATORS[self.split_on]
        tags = [tag for tag in map(str.strip, separator.split(caption)) if tag]
        head, moving = tags[: self.keep], tags[self.keep :]
        if self.original or len(moving) < 2:
            yield caption
        if len(moving) < 2:
            return
        end = mark.strip() if caption.endswith(mark.strip()) else ""
        for number in range(self.count):
            key = key64(self.seed, "caption shuffle", caption, number).to_bytes(8, "little")
            draws = unpack(f"<{len(moving)}Q", shake_128(key).digest(8 * len(moving)))
            order = (tag for _, tag in sorted(zip(draws, moving, strict=True)))
            yield mark.join((*head, *order)) + end


@dataclass(frozen=True)
class Trigger:
    """The word that calls up what is trained.

    Args:
        word: One or more words.
        prepend: Put it before captions that do not hold it.
    """

    word: str
    prepend: bool = False

    def __call__(self, caption: str) -> str:
        """`caption` with the word in the place of ``[trigger]``, or before it."""
        filled = caption.replace(PLACEHOLDER, self.word)
        if not self.prepend or self._standing.search(filled):
            return filled
        return f"{self.word} {filled}".strip()

    @cached_property
    def _standing(self) -> re.Pattern[str]:
        """The word, not as a part of a longer one."""
        return re.compile(rf"(?<!\w){re.escape(self.word)}(?!\w)")


PLACEHOLDER = "[trigger]"
"""Stands in captions for the trigger word."""


def surrounded(prefix: str, caption: str, suffix: str) -> str:
    """The three with blanks between; none before a suffix that begins with a punctuation mark."""
    before = " ".join(part for part in (prefix, caption) if part)
    gap = "" if not before or suffix[:1] in (*",.;:!?", "") else " "
    return f"{before}{gap}{suffix}"
