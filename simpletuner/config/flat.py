"""Flat keys, as users write them, and the sections that hold them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from simpletuner.config.read import SECRET
from simpletuner.config.renames import RENAMES
from simpletuner.config.root import Config
from simpletuner.config.source import Given
from simpletuner.config.unsupported import UNSUPPORTED, asks_nothing
from simpletuner.config.values import Kind, is_absent, kind_of, read_value
from simpletuner.config.wording import explain
from simpletuner.core.errors import Problem, did_you_mean
from simpletuner.core.section import Hint, Section, hint_of, inner_section, is_pending

KEEPS_EMPTY = frozenset({"validation_negative_prompt", "resume_from_checkpoint"})
"""Settings whose empty text is a value; everywhere else it leaves the default."""

_IGNORED = frozenset({"$schema"})
_SECRET_NAME = re.compile(r"(token|secret|password|api_key|access_key)(_id)?$")

SectionT = TypeVar("SectionT", bound=Section)


@dataclass(frozen=True)
class Setting:
    """One key: where its value goes and what is known of it.

    Args:
        key: Its name in files and on the command line.
        section: The section's name in `Config`; empty for a key of a dataset entry.
        field: Its declaration.
        kind: What it takes.
    """

    key: str
    section: str
    field: FieldInfo
    kind: Kind

    @property
    def hint(self) -> Hint:
        """What the declaration carries beside type and range."""
        return hint_of(self.field)

    @property
    def help(self) -> str:
        """Its help text, in one line."""
        return " ".join((self.field.description or "").split())


def settings_of(section: type[Section], name: str = "") -> dict[str, Setting]:
    """The settings of one section, by key."""
    return {
        key: Setting(key, name, field, kind_of(field.annotation))
        for key, field in section.model_fields.items()
    }


def sections() -> dict[str, type[Section]]:
    """The sections of `Config`, by name, in the order of the documentation."""
    return {name: field.annotation for name, field in Config.model_fields.items()}  # type: ignore[misc]


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        key: setting
        for name, section in sections().items()
        for key, setting in settings_of(section, name).items()
    }
)
"""Every key of ``config.json``."""


def canonical(key: str, renames: Mapping[str, str] = RENAMES) -> str:
    """The key's own name: without leading dashes, in lower case, with underscores, renamed."""
    name = key.strip().lstrip("-").lower().replace("-", "_")
    return renames.get(name, name)


def is_switch(key: str) -> bool:
    """True if a flag of that spelling needs no value."""
    setting = SETTINGS.get(canonical(key))
    return setting is not None and setting.kind.switch


def unknown(given: Given, known: Iterable[str], renames: Mapping[str, str] = RENAMES) -> Problem:
    """What to say of a key that is no setting."""
    name = canonical(given.key, renames)
    if name in UNSUPPORTED:
        return given.problem(UNSUPPORTED[name])
    if _SECRET_NAME.search(name):
        return given.problem(SECRET)
    return given.problem(f"unknown setting{did_you_mean(name, known)}")


def by_name(
    given: Sequence[Given],
    known: Mapping[str, Setting],
    problems: list[Problem],
    renames: Mapping[str, str] = RENAMES,
) -> dict[str, Given]:
    """One file's keys under their own names.

    What is unknown or written twice goes to `problems`; a setting of SimpleTuner that is not here
    is passed over where its value asks for nothing.
    """
    named: dict[str, Given] = {}
    for item in given:
        name = canonical(item.key, renames)
        if name in _IGNORED:
            continue
        if name not in known:
            if name in UNSUPPORTED and asks_nothing(name, item.value):
                continue
            problems.append(unknown(item, known, renames))
        elif name in named:
            first = named[name]
            problems.append(
                item.problem(f"is already set on {first.place} as {first.key}; keep one of the two")
            )
        else:
            named[name] = item
    return named


def read_values(
    named: Mapping[str, Given], known: Mapping[str, Setting], notes: list[str]
) -> dict[str, Any]:
    """The values of `named`, loosely written ones read; absent ones are left out."""
    values: dict[str, Any] = {}
    for name, given in named.items():
        if is_absent(given.value) and not (name in KEEPS_EMPTY and given.value == ""):
            continue
        values[name], note = read_value(given, known[name].kind)
        if note:
            notes.append(note)
    return values


def build_section(
    section: type[SectionT],
    values: Mapping[str, Any],
    given: Mapping[str, Given],
    file: str | None = None,
) -> tuple[SectionT | None, list[Problem]]:
    """`section` of the usable ones of `values`, and what is wrong with the others.

    Args:
        section: What to build.
        values: Its values by key.
        given: Where each of them stands.
        file: What messages call the file in which a missing one is missing.

    Returns:
        None instead of the section where not even the usable values make one.
    """
    known = settings_of(section)
    inside = {
        key: list(problems_inside(inner, value, given[key]))
        for key, value in values.items()
        if isinstance(value, Mapping) and (inner := inner_section(known[key].field))
    }
    values = {key: value for key, value in values.items() if not inside.get(key)}
    built, problems = _built(section, known, values, given, file)
    return built, [*(each for found in inside.values() for each in found), *problems]


def problems_inside(
    section: type[Section], values: Mapping[str, Any], given: Given, title: str = ""
) -> Iterator[Problem]:
    """What is wrong with an object that is read as a section.

    Args:
        section: As which it is read.
        values: The object.
        given: The setting it is the value of.
        title: Whose settings these are, if that is not the setting itself.
    """
    known = settings_of(section)
    for name in values:
        if name not in known:
            near = did_you_mean(name, known) or f"; it has {', '.join(known)}"
            yield given.problem(f"{title or given.key} has no such option{near}", inside=(name,))
    usable = {name: value for name, value in values.items() if name in known}
    parts = {name: given.part(name) for name in usable}
    for problem in build_section(section, usable, parts)[1]:
        is_missing = problem.key in known
        yield given.problem(problem.message, inside=(problem.key,)) if is_missing else problem


def _built(
    section: type[SectionT],
    known: Mapping[str, Setting],
    values: Mapping[str, Any],
    given: Mapping[str, Given],
    file: str | None,
) -> tuple[SectionT | None, list[Problem]]:
    """`section` of values that have no section inside, or a sound one."""
    problems: dict[str, Problem] = {}
    for key, value in values.items():
        if sentence := _slip(value, known[key]):
            problems[key] = given[key].problem(sentence)
    while True:
        try:
            built = section(**{key: v for key, v in values.items() if key not in problems})
        except ValidationError as error:
            found = _found(error, known, given, file)
            if found.keys() <= problems.keys() or not found.keys() <= values.keys():
                return None, list({**found, **problems}.values())
            problems.update(found)
        else:
            return built, list(problems.values())


def _slip(value: Any, setting: Setting) -> str:
    """What pydantic lets pass: true as a number, and numbers that are none."""
    kind = setting.kind
    if isinstance(value, bool) and kind != Kind() and not kind.switch:
        return f"must be {kind.words}, got {'true' if value else 'false'}"
    if isinstance(value, float) and not isfinite(value):
        return f"must be a finite number, got {value}"
    return ""


def _found(
    error: ValidationError,
    known: Mapping[str, Setting],
    given: Mapping[str, Given],
    file: str | None,
) -> dict[str, Problem]:
    """What pydantic found, by key; of a section as a whole, by the first given key it names."""
    by_key: dict[str, list[Mapping[str, Any]]] = {}
    for item in error.errors(include_url=False):
        by_key.setdefault(str(item["loc"][0]) if item["loc"] else "", []).append({**item})
    problems = {}
    for key, items in by_key.items():
        sentence = explain(items, known[key].kind if key in known else Kind())
        subject = key or next((name for name in given if _names(sentence, name)), "")
        problems[key] = (
            given[subject].problem(sentence) if subject in given else Problem(sentence, key, file)
        )
    return problems


def _names(sentence: str, key: str) -> bool:
    return re.search(rf"\b{key}\b", sentence) is not None


def flatten(config: Config) -> dict[str, Any]:
    """Every setting of `config` under its flat key, as plain JSON values."""
    return {
        key: value
        for section in config.model_dump(mode="json").values()
        for key, value in section.items()
    }


def waiting(built: Iterable[Section | None], given: Mapping[str, Given]) -> Iterator[Problem]:
    """What the sections ask for that is not built yet."""
    for section in built:
        if section is None:
            continue
        for key, value in dict(section).items():
            field = type(section).model_fields[key]
            if not is_pending(field, value):
                continue
            asked = [str(item) for item in _items(value) if is_pending(field, item)]
            shown = ", ".join(asked) if is_choice(hint_of(field)) else ""
            message = f"{shown} is not built yet".strip()
            yield given[key].problem(message) if key in given else Problem(message, key=key)


def _items(value: object) -> Sequence[object]:
    return value if isinstance(value, (list, tuple)) else (value,)


def is_choice(hint: Hint) -> bool:
    """True if only some values of the setting are not built yet."""
    return hint.table is not None or isinstance(hint.pending, tuple)
