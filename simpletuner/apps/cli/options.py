"""``simpletuner options``: what the settings are, from their declarations."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

from simpletuner.config.describe import Described, dataset_settings, described, table_rows
from simpletuner.config.flat import SETTINGS, canonical, sections
from simpletuner.config.unsupported import UNSUPPORTED
from simpletuner.core.errors import did_you_mean

HELP = """\
usage: simpletuner options [NAME …]

Without a name: every setting, by section. With names: what each one does, its type, default, range
and values. A word that is no setting lists the settings whose name holds it.
"""


def run(arguments: Sequence[str]) -> int:
    """Explain the settings that `arguments` name, or list all of them."""
    if {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return 0
    if not arguments:
        print(listing())
        return 0
    return max(_explain(name) for name in arguments)


def listing() -> str:
    """Every setting with its default, by section."""
    blocks = []
    for name, section in sections().items():
        keys = [setting for setting in SETTINGS.values() if setting.section == name]
        rows = [described(setting) for setting in keys]
        width = max(len(row.key) for row in rows)
        lines = [f"{name}: {(section.__doc__ or '').strip()}"]
        lines += [f"  {row.key:<{width}}  {row.default}{_mark(row)}" for row in rows]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _mark(row: Described) -> str:
    return "  (not built yet)" if row.pending is True else ""


def _explain(name: str) -> int:
    key = canonical(name)
    found = [
        (where, settings[key])
        for where, settings in (("", SETTINGS), ("multidatabackend.json: ", dataset_settings()))
        if key in settings
    ]
    if found:
        for where, setting in found:
            print(explanation(described(setting), where))
        return 0
    if key in UNSUPPORTED:
        print(f"{name}: {UNSUPPORTED[key]}")
        return 0
    holding = [known for known in SETTINGS if key and key in known]
    if holding:
        print(f"settings with {name!r} in their name: {', '.join(holding)}")
        return 0
    print(f"unknown setting {name!r}{did_you_mean(key, SETTINGS)}", file=sys.stderr)
    return 2


def explanation(row: Described, where: str = "") -> str:
    """One setting in full."""
    lines = [
        f"{where}{row.key}",
        *textwrap.wrap(row.help, 96, initial_indent="  ", subsequent_indent="  "),
    ]
    facts = (
        ("type", "text, one of the names below" if row.table else row.type),
        ("default", row.default),
        ("range", row.range),
        ("unit", row.unit),
        ("not built", "" if row.table else row.waiting),
    )
    lines += [f"  {name:<9} {value}" for name, value in facts if value]
    for name, summary in table_rows(row):
        lines.append(f"    {name:<24} {summary}".rstrip())
    return "\n".join(lines)
