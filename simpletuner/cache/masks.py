"""Masks in latent cells: reduced when training first meets them, and kept beside the latents.

Letters: B batch, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from simpletuner.cache.fingerprint import mask_keys
from simpletuner.cache.store import naming
from simpletuner.core.errors import DataError
from simpletuner.data.pixels import PictureError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from simpletuner.cache.store import TensorStore
    from simpletuner.core.types import Sample
    from simpletuner.data.source import DataSource

TENSOR = "mask"


class MaskCache:
    """The masks of pictures as they weigh the loss.

    Args:
        stores: Of the latents, by the id of the dataset; one without a store keeps nothing.
    """

    def __init__(self, stores: Mapping[str, TensorStore]) -> None:
        self._stores = stores

    def masks(
        self,
        source: DataSource,
        rows: Sequence[int],
        samples: Sequence[Sample],
        cells: tuple[int, int],
    ) -> torch.Tensor | None:
        """[B, 1, h, w] fp32 in 0..1, the share of each latent cell that is learned; None for all.

        Args:
            source: The dataset of the draws.
            rows: Of their pictures.
            samples: The draws.
            cells: h and w.

        Raises:
            DataError: A mask cannot be decoded, or was changed since it was indexed.
            CacheError: An entry is damaged.
        """
        masked = [i for i, sample in enumerate(samples) if sample.masked]
        if not masked:
            return None
        found = torch.ones(len(samples), 1, *cells)
        store = self._stores.get(source.id)
        if store is None:
            for i in masked:
                found[i] = _reduced(source, rows[i], samples[i], cells)
            return found
        boxes = np.array([samples[i].geometry.numbers for i in masked], np.int32)
        keys = self._keys(source, np.array([rows[i] for i in masked]), boxes, cells)
        for i, key, row in zip(masked, keys, store.locate(keys).tolist(), strict=True):
            if row < 0:
                found[i] = _reduced(source, rows[i], samples[i], cells)
                store.put(key, {TENSOR: found[i]})
            else:
                with naming(f"the mask of {samples[i].path}"):
                    store.read_into(row, {TENSOR: found[i]})
        return found

    def keys(self, source: DataSource, factor: int) -> set[bytes]:
        """The entries there are of a dataset's masks.

        Args:
            factor: Pixels along the edge of a latent cell.
        """
        store = self._stores.get(source.id)
        if store is None or not source.masked:
            return set()
        found: set[bytes] = set()
        boxes, sizes = source.boxes(), np.unique(source.buckets, axis=0)
        for width, height in sizes.tolist():
            rows = np.flatnonzero((source.buckets == (width, height)).all(axis=1))
            keys = self._keys(source, rows, boxes[rows], (height // factor, width // factor))
            there = np.flatnonzero(store.locate(keys) >= 0).tolist()
            found.update(keys[i] for i in there)
        return found

    def _keys(
        self,
        source: DataSource,
        rows: NDArray[np.int64],
        boxes: NDArray[np.int32],
        cells: tuple[int, int],
    ) -> list[bytes]:
        kind = "alpha" if source.settings.alpha_as_mask else "mask"
        return mask_keys(source.mask_contents(rows), boxes, kind=kind, cells=cells)


def _reduced(source: DataSource, row: int, sample: Sample, cells: tuple[int, int]) -> torch.Tensor:
    """[1, h, w], the mean of the pixels of each cell."""
    try:
        pixels = torch.from_numpy(source.mask(row, sample.geometry))
    except PictureError as error:
        raise DataError(error.message, fix="repair it and start again") from error
    return adaptive_avg_pool2d(pixels[None].float() / 255, list(cells))
