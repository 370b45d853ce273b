"""Which pictures of a dataset are trained on, why the others are not, and when that is too many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from simpletuner.core.errors import DataError
from simpletuner.data.beside import Beside
from simpletuner.data.captions import CaptionRule
from simpletuner.data.columns import bytes16, kept, keys_of, sizes_of
from simpletuner.data.excluded import FAULTS_ALLOWED, Excluded, listed
from simpletuner.data.geometry import Sizes
from simpletuner.data.index import NO_CAPTION
from simpletuner.data.settings import DatasetSettings
from simpletuner.data.sizing import Sizing
from simpletuner.data.storage.base import PICTURE_SUFFIXES

_REASONS = ("reason", "caption_reason")


@dataclass(frozen=True)
class Choice:
    """The n pictures that are usable and wanted.

    Args:
        usable: Their rows.
        targets: [n, 2] the size each is trained at.
        rejects: Reason by path of those that cannot be used.
        left_out: What each of the user's filters took, by its setting.
    """

    usable: pa.Table
    targets: Sizes
    rejects: dict[str, str]
    left_out: dict[str, Excluded]


def choose(
    settings: DatasetSettings, beside: Beside, captions: CaptionRule, sizing: Sizing, folder: str
) -> Choice:
    """Look through all pictures of a dataset.

    Args:
        settings: Of the dataset.
        beside: All pictures, and what goes with them.
        captions: How captions are made of what was found.
        sizing: How sizes are.
        folder: What messages call the place.

    Raises:
        DataError: There is none, too many are unusable, one lacks what goes with it, or none is
            left.
    """
    if not len(beside.table):
        looked = " ".join(sorted(PICTURE_SUFFIXES))
        raise DataError(
            f"dataset {settings.id}: there are no pictures in {folder} (looked for {looked})",
            fix="correct instance_data_dir",
        )
    sound, rejects = _sound(settings, beside, captions)
    sizes, keys = sizes_of(sound), keys_of(bytes16(sound["content"]))
    targets = sizing.targets(sizes, keys)
    keep = np.ones(len(sound), np.bool_)
    taken: dict[str, Excluded] = {}
    for name, out in sizing.left_out(sizes, targets, keys).items():
        gone = np.flatnonzero(out & keep)
        if len(gone):
            taken[name] = Excluded(name, len(gone), sound["path"][int(gone[0])].as_py())
        keep &= ~out
    if not keep.any():
        lines = [f"{len(sound) + len(rejects)} pictures found"]
        lines += [f"{len(rejects)} cannot be used"] * bool(rejects)
        lines += [f"{out.count} left out by {name}" for name, out in taken.items()]
        text = "\n".join(f"  {line}" for line in [*lines, "0 left"])
        heading = f"dataset {settings.id}: nothing is left to train on"
        named = [listed(rejects)] if rejects else []
        raise DataError(
            "\n".join([heading, text, *named, *beside.alone(settings.id)]),
            fix="mend what is named, or widen the settings that leave pictures out",
        )
    return Choice(kept(sound, pa.array(keep)), targets[keep], rejects, taken)


def _sound(
    settings: DatasetSettings, beside: Beside, captions: CaptionRule
) -> tuple[pa.Table, dict[str, str]]:
    """The rows that can be read and have what belongs to them, the reasons of the others."""
    table = beside.table
    fault = pc.not_equal(table["status"], "ok")
    if captions.has_texts:
        lacks = pc.is_null(table["caption"])
        if not captions.needs_text:  # one that cannot be read is a fault all the same
            lacks = pc.and_(lacks, pc.is_valid(table["caption_reason"]))
        fault = pc.or_(fault, lacks)
    fault, unpaired = beside.lacking(fault)
    faulty = table.filter(fault)
    told = [name for name in (*_REASONS, *beside.reasons) if name in faulty.column_names]
    reasons = pc.coalesce(*(faulty[name] for name in told), pa.scalar(NO_CAPTION))
    rejects = dict(zip(faulty["path"].to_pylist(), reasons.to_pylist(), strict=True))
    few, share = FAULTS_ALLOWED
    some = len(rejects) <= max(few, share * len(table)) and unpaired is None
    if len(rejects) < len(table) and not (settings.allow_excluded or some):
        mend = "mend or remove them"
        if unpaired is not None:
            mend = f"give each a whole {unpaired} of its path and shape"
        raise DataError(
            f"dataset {settings.id}: {len(rejects)} of {len(table)} pictures cannot be used\n"
            + "\n".join([listed(rejects), *beside.alone(settings.id)]),
            fix=f"{mend}, or set allow_excluded to train on the others",
        )
    return kept(table, pc.invert(fault)), rejects
