"""What kind of value a setting takes, and how loosely written values are read."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from simpletuner.config.flags import FALSE_WORDS, TRUE_WORDS
from simpletuner.config.source import Given
from simpletuner.core.section import Section


@dataclass(frozen=True)
class Kind:
    """What a setting's type accepts; several may hold at once.

    Args:
        switch: true and false.
        whole: Whole numbers.
        real: Any number.
        text: Any text.
        choices: These words.
        items: A list of these.
        mapping: An object.
        optional: Nothing at all.
    """

    switch: bool = False
    whole: bool = False
    real: bool = False
    text: bool = False
    choices: tuple[str, ...] = ()
    items: Kind | None = None
    mapping: bool = False
    optional: bool = False

    @property
    def number(self) -> bool:
        """Any sort of number."""
        return self.whole or self.real

    @property
    def words(self) -> str:
        """The kind in the user's words: ``a whole number or a list of text``."""
        parts = [
            name
            for name, holds in (
                ("true or false", self.switch),
                ("a number", self.real),
                ("a whole number", self.whole and not self.real),
                ("text", self.text),
                ("one of " + ", ".join(self.choices), bool(self.choices)),
                ("an object", self.mapping),
            )
            if holds
        ]
        if self.items is not None:
            parts.append(f"a list of {_many(self.items.words)}")
        return " or ".join(parts) or "any value"


def _many(words: str) -> str:
    """The plural, for what a list holds."""
    return re.sub(r"\b(?:a|an) (list|number|whole number|object)\b", r"\1s", words)


def kind_of(annotation: Any) -> Kind:
    """The Kind of a type annotation."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_of(arguments[0])
    if origin in (Union, types.UnionType):
        return _either([kind_of(argument) for argument in arguments])
    if origin is Literal:
        return _either([_literal(argument) for argument in arguments])
    if origin in (list, tuple, set, frozenset, Sequence):
        inner = [kind_of(argument) for argument in arguments if argument is not Ellipsis]
        return Kind(items=_either(inner) if inner else Kind(text=True))
    if origin in (dict, Mapping) or annotation in (dict, Mapping):
        return Kind(mapping=True)
    if annotation is None or annotation is type(None):
        return Kind(optional=True)
    return _plain(annotation)


def _plain(annotation: Any) -> Kind:
    if annotation is bool:
        return Kind(switch=True)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return Kind(mapping=True)
    if annotation is int:
        return Kind(whole=True)
    if annotation is float:
        return Kind(whole=True, real=True)
    if annotation is str or (isinstance(annotation, type) and issubclass(annotation, Path)):
        return Kind(text=True)
    return Kind()


def _literal(value: object) -> Kind:
    if isinstance(value, bool):
        return Kind(switch=True)
    return Kind(optional=True) if value is None else Kind(choices=(str(value),))


def _either(kinds: Sequence[Kind]) -> Kind:
    merged = Kind()
    for kind in kinds:
        merged = replace(
            merged,
            switch=merged.switch or kind.switch,
            whole=merged.whole or kind.whole,
            real=merged.real or kind.real,
            text=merged.text or kind.text,
            choices=merged.choices + kind.choices,
            items=merged.items or kind.items,
            mapping=merged.mapping or kind.mapping,
            optional=merged.optional or kind.optional,
        )
    return merged


def is_absent(value: object) -> bool:
    """True for null and empty text, which leave the default."""
    return value is None or (isinstance(value, str) and not value.strip())


def read_value(given: Given, kind: Kind) -> tuple[Any, str]:
    """The value `given` means for a setting of `kind`, and a note if it was written loosely.

    What cannot be read is returned unchanged: validation says what is wrong with it.
    """
    if not isinstance(given.value, str):
        return given.value, ""
    value = _read_text(given.value.strip(), kind)
    if isinstance(value, str):
        return given.value, ""
    if given.text:
        return value, ""
    shown = json.dumps(given.value, ensure_ascii=False)
    where = f"{given.file} line {given.line}: " if given.file and given.line else ""
    return value, f"{where}{given.key} {shown} was read as {json.dumps(value)}"


def _read_text(text: str, kind: Kind) -> Any:
    lowered = text.lower()
    if lowered in kind.choices:
        return text
    if kind.switch and lowered in TRUE_WORDS | FALSE_WORDS:
        return lowered in TRUE_WORDS
    if kind.number and not kind.text and (number := _number(text)) is not None:
        return number
    if text[:1] in "[{" and (kind.items or kind.mapping):
        return _json(text)
    if kind.items and not kind.text and (kind.items.text or kind.items.number):
        items = [_read_text(part.strip(), kind.items) for part in text.split(",") if part.strip()]
        # Words are no list of numbers, not even a wrong one.
        return items if kind.items.text or not any(isinstance(i, str) for i in items) else text
    return text


def _number(text: str) -> int | float | None:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
