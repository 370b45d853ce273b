"""Which file of one dataset belongs to which picture of another: the one of the same path.

The ending may be another, and accents may be written in another way. n pictures, m other files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


@dataclass(frozen=True)
class Pairs:
    """What belongs together.

    Args:
        rows: [n] the number of the other file of each picture, -1 where there is none.
        several: [n] true where there is none, for two or more have the picture's path.
        alone: The paths of those of the m files that belong to no picture.
    """

    rows: NDArray[np.int32]
    several: NDArray[np.bool_]
    alone: pa.ChunkedArray


def pair(paths: pa.ChunkedArray, others: pa.ChunkedArray) -> Pairs:
    """The file in `others` that each of `paths` belongs to.

    A file of exactly the picture's path comes first and is no other picture's; then the only one
    that differs in its ending.

    Args:
        paths: [n] of the pictures, each once.
        others: [m] of the files, each once.
    """
    exact = _found(paths, others)
    taken = _among(others, paths)
    stems, other_stems = _stems(paths), pc.if_else(taken, None, _stems(others))
    rows = np.where(exact >= 0, exact, _found(stems, other_stems))
    counts = other_stems.value_counts()
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    several = (exact < 0) & (_found(stems, repeated) >= 0)
    rows[several] = -1
    used = np.zeros(len(others), np.bool_)
    used[rows[rows >= 0]] = True
    contested = _among(other_stems, stems.filter(pa.array(several)))
    alone = pc.invert(pc.or_(pa.array(used), contested.combine_chunks()))
    return Pairs(rows, several, others.filter(alone))


def _stems(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """Without their endings, and composed: macOS and archives write é as two characters."""
    return pc.utf8_normalize(pc.replace_substring_regex(paths, r"\.[^./]*$", ""), "NFC")


def _among(values: pa.ChunkedArray, known: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.is_in(values, value_set=_one(known))


def _found(values: pa.ChunkedArray, known: pa.ChunkedArray | pa.Array) -> NDArray[np.int32]:
    """[n] where each value first stands in `known`, -1 where it does not."""
    at = pc.index_in(values, value_set=_one(known))
    found: NDArray[np.int32] = at.fill_null(-1).to_numpy().astype(np.int32)
    return found


def _one(values: pa.ChunkedArray | pa.Array) -> pa.Array:
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
