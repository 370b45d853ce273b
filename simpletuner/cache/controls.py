"""Control pictures as a ControlNet sees them: pixels read anew, or latents kept beside the others.

Letters: B batch, H W the crop in px, h w in latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from simpletuner.cache.pictures import decode_now
from simpletuner.models.control import PICTURE

if TYPE_CHECKING:
    from simpletuner.cache.latents import LatentCache
    from simpletuner.core.types import Sample
    from simpletuner.data.control import ControlPictures
    from simpletuner.data.source import DataSource
    from simpletuner.models.family import Family


def encoded_beside(family: Family, sources: Sequence[DataSource]) -> list[ControlPictures]:
    """The control pictures of datasets, where the family's net sees their latents."""
    if family.control is None or family.control.picture != "latents":
        return []
    return [controls for source in sources if (controls := source.controls) is not None]


class ControlCache:
    """The control pictures of draws.

    Args:
        latents: Where those are that the family's net sees as latents.
        sources: The datasets.
        family: Whose net sees them.
    """

    def __init__(self, latents: LatentCache, sources: Sequence[DataSource], family: Family) -> None:
        self._latents = latents
        self._controls = {source.id: source.controls for source in sources}
        self._encoded = bool(encoded_beside(family, sources))

    @property
    def first(self) -> ControlPictures | None:
        """The control pictures of the first dataset that has some."""
        return next((each for each in self._controls.values() if each is not None), None)

    def controls(
        self, source: DataSource, rows: Sequence[int], samples: Sequence[Sample], epoch: int
    ) -> dict[str, torch.Tensor]:
        """By the net's own argument name, [B, 3, H, W] in [0, 1] or [B, C, h, w], fp32 on the CPU.

        Empty for a dataset without control pictures.

        Args:
            source: The dataset of the draws.
            rows: Of their pictures.
            samples: The draws.
            epoch: Of the draws.

        Raises:
            DataError: A control picture cannot be decoded, or was changed since it was indexed.
            CacheError: An entry is missing or damaged, or the memory is full.
        """
        pictures = self._controls[source.id]
        if pictures is None:
            return {}
        drawn = pictures.drawn(rows, samples)
        if self._encoded:
            return {PICTURE: self._latents.latents(pictures, drawn, epoch)}
        return {PICTURE: torch.stack(decode_now(pictures, drawn)).float() / 255}
