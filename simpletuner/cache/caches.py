"""From a planned batch to tensors: draws from the dataset, latents and text from the caches.

Letters: B batch, H W the crop in px, h w in latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simpletuner.core.types import Batch

if TYPE_CHECKING:
    from simpletuner.cache.controls import ControlCache
    from simpletuner.cache.latents import LatentCache
    from simpletuner.cache.masks import MaskCache
    from simpletuner.cache.text import TextCaches
    from simpletuner.core.seeds import Seeds
    from simpletuner.core.types import Embeds, PlannedBatch
    from simpletuner.data.source import DataSource


@dataclass(frozen=True)
class Caches:
    """Everything a batch is read from.

    Args:
        sources: The datasets, in the plan's order, then those that it does not draw from.
        text: None where captions are encoded in the step: a batch then has no embeds.
    """

    sources: tuple[DataSource, ...]
    latents: LatentCache
    text: TextCaches | None
    seeds: Seeds
    masks: MaskCache
    controls: ControlCache

    def batch(self, planned: PlannedBatch) -> Batch:
        """The tensors of one micro-batch, on the CPU."""
        source = self.sources[planned.source]
        samples = tuple(
            source.sample(row, planned.epoch, occurrence, self.seeds)
            for row, occurrence in zip(planned.rows, planned.occurrences, strict=True)
        )
        latents = self.latents.latents(source, samples, planned.epoch)
        return Batch(
            latents=latents,
            embeds=self._embeds(source.id, [sample.caption for sample in samples]),
            samples=samples,
            mask=self.masks.masks(
                source, planned.rows, samples, (latents.shape[-2], latents.shape[-1])
            ),
            controls=self.controls.controls(source, planned.rows, samples, planned.epoch),
        )

    def _embeds(self, dataset: str, captions: Sequence[str]) -> Embeds:
        return {} if self.text is None else self.text.of(dataset).embeds(captions)

    def embeds(self, captions: Sequence[str]) -> Embeds:
        """The conditioning of prompts that were prepared, [B, …]."""
        assert self.text is not None, "what is encoded in the step is not asked here"
        return self.text.default.embeds(captions)

    def open_vae(self) -> Any:
        """The VAE that latents were made with."""
        return self.latents.open_vae()

    def close(self) -> None:
        """Let VAE and text encoders go, and seal what was encoded on demand."""
        self.latents.close()
        if self.text is not None:
            self.text.close()
