"""The precision plan: what each part of a run is held in and computes in, and what that saves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simpletuner.precision.quantisers import QUANTISERS

if TYPE_CHECKING:
    from simpletuner.precision.quantise import Quantised


@dataclass(frozen=True)
class PlanRow:
    """One part.

    Args:
        part: Its name in the pipeline, or what it is.
        computes: The dtype it computes in.
        held: What its weights are held in: a row of QUANTISERS, or a dtype.
        backend: The package that holds and multiplies them.
        layers: How many are held so; None where all are, or where it has not been opened.
        exact: Its linear layers that are left as they were: those outside the blocks by name, and
            how many inside, and why.
        rest: The dtype of those and of everything else.
        before: Bytes of its weights as opened; None where it has not been.
        after: Bytes of them as held.
        note: What else there is to say.
    """

    part: str
    computes: str
    held: str
    backend: str = "torch"
    layers: int | None = None
    exact: tuple[str, ...] = ()
    rest: str = ""
    before: int | None = None
    after: int | None = None
    note: str = ""


def quantised_row(found: Quantised, computes: str) -> PlanRow:
    """The row of a part that was opened."""
    if not found.layers:
        sizes = {"before": found.before, "after": found.after}
        return PlanRow(found.part, computes, found.short, **sizes)
    inside = [f"{count} layers {why}" for why, count in found.kept.items()]
    return PlanRow(
        found.part,
        computes,
        found.name,
        str(QUANTISERS[found.name].fact("module")),
        found.layers,
        (*found.outside, *inside),
        found.short,
        found.before,
        found.after,
    )


def unopened_row(part: str, computes: str, name: str, note: str) -> PlanRow:
    """The row of a part that is not opened: what the settings would hold it in."""
    if name == "no_change":
        return PlanRow(part, computes, computes, note=note)
    return PlanRow(part, computes, name, str(QUANTISERS[name].fact("module")), note=note)


def plan_lines(rows: Sequence[PlanRow]) -> list[str]:
    """The plan as a table."""
    cells = [(row.part, f"computes in {row.computes}", _held(row), _size(row)) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    lines = ["precision plan"]
    for row, line in zip(rows, cells, strict=True):
        wide = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        lines.append(f"  {'  '.join((*wide, line[3]))}".rstrip())
        lines += [f"    {text}" for text in _more(row)]
    return lines


def _held(row: PlanRow) -> str:
    count = f", {row.layers} layers" if row.layers else ""
    by = "" if row.backend == "torch" else f" by {row.backend}"
    return f"held in {row.held}{by}{count}"


def _size(row: PlanRow) -> str:
    if row.before is None or row.after is None:
        return ""
    after = f"{row.after / 2**20:,.1f} MiB"
    if row.before == row.after:
        return after
    return f"{row.before / 2**20:,.1f} -> {after}"


def _more(row: PlanRow) -> Iterator[str]:
    if row.exact:
        yield f"in {row.rest}: {', '.join(row.exact)}"
    if row.note:
        yield row.note
