"""A setting's declaration in words: for ``simpletuner options`` and the generated documents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic.fields import FieldInfo

from simpletuner.config.flat import Setting, settings_of
from simpletuner.core.section import inner_section
from simpletuner.core.table import Table
from simpletuner.data.settings import DatasetSettings, ImageEmbedsSettings, TextEmbedsSettings

_LIMITS = MappingProxyType(
    {
        "ge": "at least {}",
        "gt": "more than {}",
        "le": "at most {}",
        "lt": "less than {}",
        "multiple_of": "a multiple of {}",
    }
)


@dataclass(frozen=True)
class Described:
    """What is known of one setting, in words.

    Args:
        key: Its name.
        help: What it does.
        type: What it takes.
        default: Its default; ``required`` where there is none.
        range: Its limits.
        unit: Its unit.
        pending: True while nothing reads it; the values that are not built yet.
        table: The rows its value names.
    """

    key: str
    help: str
    type: str
    default: str
    range: str
    unit: str
    pending: bool | tuple[str, ...]
    table: Table | None

    @property
    def waiting(self) -> str:
        """What of it is not built yet."""
        if isinstance(self.pending, tuple):
            return ", ".join(self.pending)
        return "not built yet" if self.pending else ""


def described(setting: Setting) -> Described:
    """The words for one setting."""
    hint = setting.hint
    pending = hint.pending
    if hint.table is not None:
        pending = tuple(name for name, row in hint.table.items() if row.pending)
    return Described(
        key=setting.key,
        help=setting.help,
        type=_type(setting),
        default=default_of(setting.field),
        range=limits_in_words(limits(setting.field)),
        unit=hint.unit or "",
        pending=pending,
        table=hint.table,
    )


def _type(setting: Setting) -> str:
    hint, kind = setting.hint, setting.kind
    if hint.table is not None:
        return "one of " + ", ".join(hint.table)
    return kind.words.replace("text", "path", 1) if hint.path else kind.words


def default_of(field: FieldInfo) -> str:
    """The default as it would stand in a file; ``none`` for nothing, ``required`` without one."""
    if field.is_required():
        return "required"
    return in_file(field.get_default(call_default_factory=True))


def in_file(value: Any) -> str:
    """A value as it would stand in a file."""
    if value is None:
        return "none"
    return json.dumps(plain_default(value), ensure_ascii=False)


def plain_default(value: Any) -> Any:
    """A default as a plain JSON value."""
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, (list, tuple)):
        return [plain_default(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def limits(field: FieldInfo) -> dict[str, float]:
    """The constraints of a field by pydantic's names, such as ``ge`` and ``lt``."""
    found: dict[str, float] = {}
    for constraint in field.metadata:
        if is_dataclass(constraint) and not isinstance(constraint, type):
            facts = asdict(constraint)
            found |= {name: facts[name] for name in _LIMITS if facts.get(name) is not None}
    return found


def limits_in_words(found: Mapping[str, float]) -> str:
    """``at least 1, less than 2``."""
    return ", ".join(_LIMITS[name].format(f"{value:.12g}") for name, value in found.items())


def table_rows(row: Described) -> Iterator[tuple[str, str]]:
    """Name and summary of each row that the value may name."""
    for name, entry in (row.table or {}).items():
        yield name, entry.summary + (" (not built yet)" if entry.pending else "")


def dataset_settings() -> dict[str, Setting]:
    """The keys of an entry of ``multidatabackend.json``, pictures' first."""
    keeping = {**settings_of(ImageEmbedsSettings), **settings_of(TextEmbedsSettings)}
    return with_inner({**keeping, **settings_of(DatasetSettings)})


def with_inner(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """`settings`, each followed by the keys of the object it takes, as ``key.inner``."""
    found: dict[str, Setting] = {}
    for key, setting in settings.items():
        found[key] = setting
        if inner := inner_section(setting.field):
            for name, each in settings_of(inner).items():
                found[f"{key}.{name}"] = replace(each, key=f"{key}.{name}")
    return found
