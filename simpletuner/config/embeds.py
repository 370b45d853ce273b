"""The entries of the datasets file that hold no pictures: where encoded ones and captions are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from simpletuner.config.conditioning import Read
from simpletuner.config.source import Given
from simpletuner.core.errors import Problem, did_you_mean
from simpletuner.data.settings import ImageEmbedsSettings, TextEmbedsSettings

TextRead = tuple[TextEmbedsSettings, Mapping[str, Given]]
"""A text_embeds entry, and where it says what it says."""


def default_text_embeds(entries: Sequence[TextRead]) -> TextEmbedsSettings:
    """The entry that says ``default: true``, else the first, else one with defaults."""
    chosen = [entry for entry, given in entries if "default" in given and entry.default]
    candidates = chosen or [entry for entry, _ in entries]
    return candidates[0] if candidates else TextEmbedsSettings(id="text-embeds")


def two_defaults(entries: Sequence[TextRead]) -> Iterator[Problem]:
    """Every ``default: true`` but the first."""
    said = [given["default"] for entry, given in entries if "default" in given and entry.default]
    for other in said[1:]:
        yield other.problem(f"is true on {said[0].place} already")


def misnamed(
    pictures: Sequence[Read],
    text_embeds: Sequence[TextRead],
    image_embeds: Mapping[str, ImageEmbedsSettings],
) -> Iterator[Problem]:
    """Names of entries that are not there, and a folder that is named twice."""
    for each in pictures:
        for key, known in (
            ("text_embeds", [entry.id for entry, _ in text_embeds]),
            ("image_embeds", list(image_embeds)),
        ):
            name = getattr(each.settings, key)
            if name is not None and name not in known:
                message = f"no {key} entry has the id {name!r}{did_you_mean(name, known)}"
                yield each.given[key].problem(message)
        if "image_embeds" in each.given and "cache_dir_vae" in each.given:
            message = "cache_dir_vae says where the pictures are kept; remove one of the two"
            yield each.given["image_embeds"].problem(message)


def unkept(text_embeds: Sequence[TextRead]) -> Iterator[Problem]:
    """Entries that would keep what text encoders that train make of a caption."""
    for entry, given in text_embeds:
        if entry.text_cache_ondemand and "text_cache_ondemand" in given:
            yield given["text_cache_ondemand"].problem(
                "keeps what a caption was encoded to, and train_text_encoder changes that with"
                " every step; remove one of them"
            )


def idle(
    pictures: Sequence[Read],
    text_embeds: Sequence[TextRead],
    image_embeds: Mapping[str, ImageEmbedsSettings],
    *,
    trains_text: bool,
) -> Iterator[str]:
    """Names the entries that keep nothing."""
    default = default_text_embeds(text_embeds).id
    named = {each.settings.text_embeds for each in pictures} | {default}
    for entry, _ in text_embeds:
        if trains_text:
            yield (
                f"text_embeds entry {entry.id} is not used: under train_text_encoder captions are"
                " encoded anew in each step"
            )
        elif entry.id not in named:
            yield f"text_embeds entry {entry.id} is not used; {default} keeps all captions"
    named = {each.settings.image_embeds for each in pictures}
    for name in image_embeds:
        if name not in named:
            yield f"image_embeds entry {name} is not used; no dataset names it in image_embeds"
