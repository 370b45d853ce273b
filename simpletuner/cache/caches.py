"""From a planned batch to tensors: draws from the dataset, latents and text from the caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simpletuner.core.types import Batch

if TYPE_CHECKING:
    from simpletuner.cache.latents import LatentCache
    from simpletuner.cache.text import TextCache
    from simpletuner.core.seeds import Seeds
    from simpletuner.core.types import Embeds, PlannedBatch
    from simpletuner.data.source import DataSource


@dataclass(frozen=True)
class Caches:
    """Everything a batch is read from.

    Args:
        sources: The datasets, in the plan's order.
    """

    sources: tuple[DataSource, ...]
    latents: LatentCache
    text: TextCache
    seeds: Seeds

    def batch(self, planned: PlannedBatch) -> Batch:
        """The tensors of one micro-batch, on the CPU."""
        source = self.sources[planned.source]
        samples = tuple(
            source.sample(row, planned.epoch, occurrence, self.seeds)
            for row, occurrence in zip(planned.rows, planned.occurrences, strict=True)
        )
        return Batch(
            latents=self.latents.latents(source, samples, planned.epoch),
            embeds=self.embeds([sample.caption for sample in samples]),
            samples=samples,
        )

    def embeds(self, captions: Sequence[str]) -> Embeds:
        """The conditioning of captions that were prepared, [B, …]."""
        return self.text.embeds(captions)

    def open_vae(self) -> Any:
        """The VAE that latents were made with."""
        return self.latents.open_vae()

    def close(self) -> None:
        """Let the VAE go, and seal what was encoded on demand."""
        self.latents.close()
