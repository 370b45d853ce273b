"""Captions that are longer than a text encoder sees: how many, and the longest of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simpletuner.core.events import Bus
    from simpletuner.models.family import Family

CHUNK = 4096
"""Captions handed to a tokenizer at once."""

SHOWN = 60
"""So many characters of the longest caption are shown."""


@dataclass(frozen=True)
class Cut:
    """What text encoders of one view see only in part.

    Args:
        encoders: Their names in the pipeline.
        window: The tokens they see of a caption, its marks of beginning and end among them.
        count: How many captions are longer.
        longest: The longest of them.
        tokens: What it has.
        lost: True if no other encoder sees more.
    """

    encoders: tuple[str, ...]
    window: int
    count: int
    longest: str
    tokens: int
    lost: bool

    def told(self, title: str, total: int) -> str:
        """The sentence for `total` captions of `title`."""
        names = " and ".join(self.encoders)
        end = "; what comes after is not learned" if self.lost else ""
        more = "…" if len(self.longest) > SHOWN else ""
        return (
            f"{title}: {self.count} of {total} captions are longer than the {self.window} tokens"
            f" {names} {'see' if len(self.encoders) > 1 else 'sees'}{end}; the longest has"
            f" {self.tokens}: {self.longest[:SHOWN]}{more}"
        )


def cut_captions(
    family: Family, tokenizers: Mapping[str, Any], captions: Sequence[str]
) -> list[Cut]:
    """What the text encoders of `family` see only in part of `captions`; needs no weights.

    Args:
        family: Whose they are.
        tokenizers: Its `open_tokenizers`.
        captions: Each once.
    """
    windows = family.windows(tokenizers)
    widest = max(windows.values())
    found: dict[tuple[int, int, str, int], list[str]] = {}
    for name, tokenizer in tokenizers.items():
        count, tokens, longest = 0, 0, ""
        for caption, length in zip(captions, _lengths(tokenizer, captions), strict=True):
            count += length > windows[name]
            if length > tokens:
                tokens, longest = length, caption
        if count:
            found.setdefault((windows[name], count, longest, tokens), []).append(name)
    return [
        Cut(tuple(names), window, count, longest, tokens, window == widest)
        for (window, count, longest, tokens), names in found.items()
    ]


def tell_cut(family: Family, captions: Mapping[str, Sequence[str]], bus: Bus) -> None:
    """Say once, before they are encoded, which captions the encoders see only in part.

    Args:
        captions: By whose they are, each once.
    """
    tokenizers = family.open_tokenizers()
    for title, texts in captions.items():
        for cut in cut_captions(family, tokenizers, texts):
            bus.notice(cut.told(title, len(texts)), "warning" if cut.lost else "info")


def _lengths(tokenizer: Any, captions: Sequence[str]) -> Iterator[int]:
    for start in range(0, len(captions), CHUNK):
        chunk = list(captions[start : start + CHUNK])
        # It would warn of every caption on its own.
        yield from map(len, tokenizer(chunk, verbose=False).input_ids)
