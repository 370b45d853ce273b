"""Everything that goes with the pictures of one dataset, row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from simpletuner.data.excluded import listed
from simpletuner.data.geometry import Keys
from simpletuner.data.paired import Paired


class Beside:
    """The masks, control pictures and references of a dataset.

    Args:
        sets: Each of them.
        table: All pictures of the dataset.

    Attributes:
        table: The same with the columns of each set.
    """

    def __init__(self, sets: Sequence[Paired], table: pa.Table) -> None:
        self.sets = tuple(sets)
        self._alone: dict[str, list[str]] = {}
        for each in self.sets:
            table, self._alone[each.id] = each.beside(table)
        self.table = table
        self.take(table)

    def take(self, usable: pa.Table) -> None:
        """Number what goes with the rows of `usable`, a part of `table`."""
        self._rows = {each.id: usable[each.columns[0]].to_numpy() for each in self.sets}

    @property
    def reasons(self) -> tuple[str, ...]:
        """The columns of `table` that say why a picture lacks something."""
        return tuple(each.columns[1] for each in self.sets)

    def lacking(self, fault: pa.ChunkedArray) -> tuple[pa.ChunkedArray, str | None]:
        """Which pictures cannot be used, and what sound ones lack, in a word.

        Args:
            fault: Those that cannot be used in any case.
        """
        word = None
        for each in self.sets:
            lacks = pc.is_valid(self.table[each.columns[1]])
            if word is None and pc.any(pc.and_not(lacks, fault)).as_py():
                word = each.word
            fault = pc.or_(fault, lacks)
        return fault, word

    def decoded(self) -> tuple[Paired, ...]:
        """The sets after each file of a row was decoded once; the same where all are whole."""
        return tuple(each.decoded(self._rows[each.id]) for each in self.sets)

    def digests(self, keys: Keys) -> Iterator[tuple[str, str]]:
        """A name and a value for each set that changes when a file of a row does.

        Args:
            keys: [n] of the pictures.
        """
        for each in self.sets:
            name = "masks" if each.kind == "mask" else f"{each.kind} {each.id}: pictures"
            yield name, each.digest(self._rows[each.id], keys)

    @property
    def masks(self) -> Paired | None:
        """The set of masks."""
        return next((each for each in self.sets if each.kind == "mask"), None)

    @property
    def control(self) -> Paired | None:
        """The set of control pictures."""
        return next((each for each in self.sets if each.kind == "controlnet"), None)

    def image(self, each: Paired, row: int) -> Image.Image:
        """The file of one set that goes with a row; see `Paired.image`."""
        return each.image(int(self._rows[each.id][row]))

    def path(self, each: Paired, row: int) -> str:
        """The path of the file of one set that goes with a row."""
        return each.path(int(self._rows[each.id][row]))

    def contents(self, each: Paired, rows: NDArray[np.int64]) -> NDArray[np.void]:
        """[k] void of 16 bytes, the digests of the files of one set that go with some rows."""
        return each.contents(self._rows[each.id][rows])

    def alone(self, dataset: str) -> list[str]:
        """Names the files without a picture; empty without any."""
        lines = []
        for each in self.sets:
            if alone := self._alone[each.id]:
                are = "s in {} are" if len(alone) > 1 else " in {} is"
                lines.append(f"{len(alone)} {each.word}{are.format(each.id)} left over:")
                lines.append(listed(dict.fromkeys(alone, f"no picture in {dataset}")))
        return lines
