"""What is wrong with a value, in plain words: pydantic's findings as the user reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from simpletuner.config.values import Kind
from simpletuner.core.errors import did_you_mean

_LIMITS = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "too_short": "needs at least {min_length} values",
    "too_long": "takes at most {max_length} values",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "has the wrong form (`simpletuner options` describes it)",
    "finite_number": "must be a finite number",
}


def written(value: object) -> str:
    """A value as the user would write it, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


def explain(errors: Iterable[Mapping[str, Any]], kind: Kind) -> str:
    """One sentence for what pydantic found wrong with one value.

    Args:
        errors: Its findings; a value that may be of several types has one for each type.
        kind: What the setting takes.
    """
    found = list(errors)
    if any(error["type"] == "missing" for error in found):
        return "is required"
    # A number out of range was tried as a number: the other types' findings do not matter then.
    telling = [error for error in found if error["type"] in _LIMITS or "error" in _context(error)]
    error = telling[0] if telling else found[0]
    if "error" in _context(error):
        return _own_words(error)
    if kind.items is not None and any(isinstance(step, int) for step in error["loc"]):
        kind = kind.items  # one of a list's items is wrong
    sentence = _limit(error) or _choice(error["input"], kind) or f"must be {kind.words}"
    return f"{sentence}, got {written(error['input'])}"


def _context(error: Mapping[str, Any]) -> Mapping[str, Any]:
    context = error.get("ctx")
    return context if isinstance(context, Mapping) else {}


def _own_words(error: Mapping[str, Any]) -> str:
    """The sentence of one of our own validators."""
    sentence = str(_context(error)["error"])
    return sentence if sentence else str(error["msg"])


def _limit(error: Mapping[str, Any]) -> str:
    sentence = _LIMITS.get(error["type"], "")
    return sentence.format(**{key: _round(value) for key, value in _context(error).items()})


def _round(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _choice(value: object, kind: Kind) -> str:
    """For a setting of fixed words: all of them, or the nearest."""
    if not kind.choices or kind.text:
        return ""
    near = did_you_mean(str(value), kind.choices).removeprefix("; ").removesuffix("?")
    return f"must be {kind.words}" + (f" ({near}?)" if near else "")
