"""The control pictures of a dataset, told as pictures of their own: one for each row of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simpletuner.core.types import Geometry, Sample
from simpletuner.data.pixels import render_beside

if TYPE_CHECKING:
    from simpletuner.data.beside import Beside
    from simpletuner.data.paired import Paired
    from simpletuner.data.settings import DatasetSettings
    from simpletuner.data.source import DataSource


class Pictures(Protocol):
    """What an encoder asks of pictures: those of a dataset, or what goes with them."""

    @property
    def id(self) -> str:
        """Their name, which no others have."""

    @property
    def settings(self) -> DatasetSettings:
        """How they are decoded and kept."""

    @property
    def content(self) -> NDArray[np.void]:
        """[n] void of 16 bytes, the digest of each file."""

    @property
    def buckets(self) -> NDArray[np.int32]:
        """[n, 2] width and height that is encoded."""

    def __len__(self) -> int:
        """How many there are."""

    def boxes(self) -> NDArray[np.int32]:
        """[n, 9] what is done to each."""

    def geometry(self, row: int) -> Geometry:
        """What is done to one."""

    def path(self, row: int) -> str:
        """The relative path of one."""

    def pixels(self, drawn: Sample | int) -> NDArray[np.uint8]:
        """[H, W, 3] uint8 sRGB of a draw, or of a row by its cached geometry."""

    def remember(self, faults: Mapping[str, str]) -> None:
        """Keep why some cannot be decoded, by path."""


def asked_for(pictures: Pictures, drawn: Sample | int) -> tuple[str, str, Geometry]:
    """The path, the content's digest and the geometry of a draw, or of a row as it is cached."""
    if isinstance(drawn, Sample):
        return drawn.path, drawn.id, drawn.geometry
    content = bytes(pictures.content[drawn]).hex()
    return pictures.path(drawn), content, pictures.geometry(drawn)


class ControlPictures:
    """The control pictures of the n pictures of a dataset; implements Pictures.

    Each is cut as its picture is, and kept where its picture's latents are.

    Attributes:
        id: Their name, which no dataset has.
        settings: Those of the dataset, with what the control pictures say of themselves.
        content: [n] void of 16 bytes, the digest of each file.
        buckets: [n, 2] width and height that is given to the model.
    """

    def __init__(self, source: DataSource, beside: Beside, paired: Paired) -> None:
        self._source, self._beside, self._paired = source, beside, paired
        self.id = f"{paired.id} of {source.id}"
        ground = paired.settings.image_background
        self.settings = source.settings.model_copy(update={"image_background": ground})
        self.content = beside.contents(paired, np.arange(len(source)))
        self.buckets = source.buckets

    def __len__(self) -> int:
        """How many there are."""
        return len(self._source)

    def boxes(self) -> NDArray[np.int32]:
        """See Pictures."""
        return self._source.boxes()

    def geometry(self, row: int) -> Geometry:
        """See Pictures."""
        return self._source.geometry(row)

    def path(self, row: int) -> str:
        """See Pictures."""
        return self._beside.path(self._paired, row)

    def drawn(self, rows: Sequence[int], samples: Sequence[Sample]) -> tuple[Sample, ...]:
        """The control pictures of some draws.

        Args:
            rows: Of the pictures.
            samples: Their draws.
        """
        return tuple(
            replace(sample, id=bytes(self.content[row]).hex(), path=self.path(row))
            for row, sample in zip(rows, samples, strict=True)
        )

    def pixels(self, drawn: Sample | int) -> NDArray[np.uint8]:
        """See Pictures.

        Raises:
            PictureError: The file cannot be read or decoded.
            DataError: It is not the file that was indexed.
        """
        path, content, geometry = asked_for(self, drawn)
        return render_beside(self._paired.opened(path, content), geometry)

    def picture(self, row: int) -> Image.Image:
        """A whole control picture, upright and flattened, before its resize.

        Raises:
            PictureError: The file cannot be read or decoded.
            DataError: It is not the file that was indexed.
        """
        return self._beside.image(self._paired, row)

    def remember(self, faults: Mapping[str, str]) -> None:
        """See Pictures: nothing is kept, for each start decodes those that are new."""
