"""JSON Schemas of the two settings files, for completion and help in an editor."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from simpletuner.config.describe import described, limits, plain_default
from simpletuner.config.flat import SETTINGS, Setting, settings_of
from simpletuner.config.renames import DATASET_RENAMES, RENAMES
from simpletuner.config.values import Kind
from simpletuner.core.section import inner_section
from simpletuner.data.settings import (
    DatasetSettings,
    EntrySettings,
    ImageEmbedsSettings,
    TextEmbedsSettings,
)

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_LIMITS = MappingProxyType(
    {
        "ge": "minimum",
        "gt": "exclusiveMinimum",
        "le": "maximum",
        "lt": "exclusiveMaximum",
        "multiple_of": "multipleOf",
    }
)
_NUMBER_TEXT = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"
_SWITCH_TEXT = r"^\s*([Tt]rue|[Ff]alse|TRUE|FALSE|[Yy]es|[Nn]o|[Oo]n|[Oo]ff|0|1)\s*$"
_SHARED = MappingProxyType(
    {
        "number_text": {"type": "string", "pattern": _NUMBER_TEXT},
        "switch_text": {"type": "string", "pattern": _SWITCH_TEXT},
        "absent": {"enum": [None, ""], "description": "Leaves the default."},
    }
)
# Other spellings of a key (dashes in front, upper case, hyphens) are read too, without help.
_OTHER_SPELLINGS = "^-|[A-Z]|[a-z]-[a-z]"


def config_schema() -> dict[str, Any]:
    """The schema of ``config.json``."""
    return {
        "$schema": _DIALECT,
        "title": "SimpleTuner settings",
        **_object(SETTINGS, RENAMES),
        "$defs": dict(_SHARED),
    }


def datasets_schema() -> dict[str, Any]:
    """The schema of ``multidatabackend.json``."""
    return {
        "$schema": _DIALECT,
        "title": "SimpleTuner datasets",
        "type": "array",
        "minItems": 1,
        "items": _one_of("text_embeds", _one_of("image_embeds", _shared("pictures"))),
        "$defs": {
            **_SHARED,
            "pictures": _entry(DatasetSettings),
            "text_embeds": _entry(TextEmbedsSettings),
            "image_embeds": _entry(ImageEmbedsSettings),
        },
    }


def _one_of(dataset_type: str, other: dict[str, Any]) -> dict[str, Any]:
    """The schema of an entry of that type, else `other`."""
    return {
        "if": {
            "properties": {"dataset_type": {"const": dataset_type}},
            "required": ["dataset_type"],
        },
        "then": _shared(dataset_type),
        "else": other,
    }


def _entry(section: type[EntrySettings]) -> dict[str, Any]:
    return {**_object(settings_of(section), DATASET_RENAMES), "required": ["id"]}


def _object(settings: Mapping[str, Setting], renames: Mapping[str, str]) -> dict[str, Any]:
    properties: dict[str, Any] = {"$schema": {"type": "string"}}
    properties |= {key: setting_schema(setting) for key, setting in sorted(settings.items())}
    for old, new in sorted(renames.items()):
        if new in settings and old not in properties:
            properties[old] = {"description": f"The same as {new}.", "deprecated": True}
    return {
        "type": "object",
        "properties": properties,
        "patternProperties": {_OTHER_SPELLINGS: {}},
        "additionalProperties": False,
    }


def setting_schema(setting: Setting) -> dict[str, Any]:
    """The schema of one setting: help, default, and every form its value is read in."""
    words = described(setting)
    notes = [words.help]
    if words.unit:
        notes.append(f"Unit: {words.unit}.")
    if words.pending is True:
        notes.append("Not built yet.")
    elif words.waiting:
        notes.append(f"Not built yet: {words.waiting}.")
    schema: dict[str, Any] = {"description": " ".join(notes)}
    default = plain_default(setting.field.get_default(call_default_factory=True))
    if not setting.field.is_required() and default is not None:
        schema["default"] = default
    forms = _forms(setting.kind, _limits(setting))
    if inner := inner_section(setting.field):
        forms = [_object(settings_of(inner), {}), {"type": "string"}]
    if setting.hint.table is not None:
        forms = [{"enum": list(setting.hint.table)}, {"type": "string"}]
    if not setting.field.is_required():
        forms.append(_shared("absent"))
    return {**schema, "anyOf": forms}


def _shared(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


def _limits(setting: Setting) -> dict[str, float]:
    return {_LIMITS[name]: value for name, value in limits(setting.field).items()}


def _forms(kind: Kind, bounds: Mapping[str, float]) -> list[dict[str, Any]]:
    """One schema for each form that a value of `kind` may have."""
    forms: list[dict[str, Any]] = []
    if kind.switch:
        forms += [{"type": "boolean"}, _shared("switch_text")]
    if kind.number:
        forms.append({"type": "number" if kind.real else "integer", **bounds})
        if not kind.text:
            forms.append(_shared("number_text"))
    if kind.choices:
        forms.append({"enum": list(kind.choices)})
    if kind.text:
        forms.append({"type": "string"})
    if kind.mapping:
        forms += [{"type": "object"}, {"type": "string"}]
    if kind.items is not None:
        # A list may also be written as text with commas, and one item without the brackets.
        inner = _forms(kind.items, {})
        forms += [{"type": "array", "items": {"anyOf": [*inner, {"type": "string"}]}}]
        forms += [form for form in ({"type": "string"}, {"type": "number"}) if form not in forms]
    return forms or [{}]
