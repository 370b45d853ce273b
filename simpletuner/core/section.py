"""Settings: one declaration per key gives validation, schema, documentation and flags."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from simpletuner.core.table import Table


@dataclass(frozen=True)
class Hint:
    """What a key carries beside its type, range and help text.

    Args:
        pending: True while nothing reads the key; a tuple while only these values are not built.
            A pending value passes `check`, which names it, and makes `train` refuse.
        table: The table the value names a row of.
        unit: The unit of a number: ``"optimizer steps"``, ``"px"``.
        path: The value is a path; relative ones are resolved against the working directory, or
            against the folder of a shipped example.
    """

    pending: bool | tuple[str, ...] = False
    table: Table | None = None
    unit: str | None = None
    path: bool = False


class Section(BaseModel):
    """A frozen group of settings; the string under a field is its help text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    @field_validator("*")
    @classmethod
    def _names_a_row(cls, value: Any, info: ValidationInfo) -> Any:
        """A field with a table takes the names of its rows, or nothing where that is allowed."""
        table = hint_of(cls.model_fields[str(info.field_name)]).table
        if table is not None and value is not None and value not in table:
            raise ValueError(table.unknown(value))
        return value


def setting(
    default: Any = ...,
    *,
    pending: bool | tuple[str, ...] = False,
    table: Table | None = None,
    unit: str | None = None,
    path: bool = False,
    **constraints: Any,
) -> Any:
    """Declare one setting: a pydantic Field with a Hint.

    Args:
        default: The value when the key is absent; ``...`` makes the key required.
        pending: See Hint, as the next three.
        table: See Hint.
        unit: See Hint.
        path: See Hint.
        constraints: ``ge``, ``gt``, ``le``, ``lt``, ``min_length`` … as pydantic's Field takes
            them.
    """
    extra: Any = {"hint": Hint(pending=pending, table=table, unit=unit, path=path)}
    return Field(default, json_schema_extra=extra, **constraints)


def hint_of(field: FieldInfo) -> Hint:
    """The Hint of a field; an empty one where it was declared without."""
    extra = field.json_schema_extra
    hint = extra.get("hint") if isinstance(extra, dict) else None
    return hint if isinstance(hint, Hint) else Hint()


def inner_section(field: FieldInfo) -> type[Section] | None:
    """The section that an object given for `field` is read as; None where it takes none."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def is_pending(field: FieldInfo, value: object) -> bool:
    """True if `value` asks of `field` something that is not built yet."""
    hint = hint_of(field)
    if hint.table is not None and isinstance(value, str) and value in hint.table:
        return hint.table[value].pending
    if isinstance(hint.pending, tuple):
        values = value if isinstance(value, tuple) else (value,)
        return any(each in hint.pending for each in values)
    return hint.pending and value != field.get_default(call_default_factory=True)


def items(value: object) -> list[Any]:
    """A list as itself, a JSON list or text with commas as its parts, anything else alone."""
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            return list(json.loads(value))
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]
