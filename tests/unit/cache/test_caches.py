"""A planned batch becomes tensors that belong together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simpletuner.cache.caches import Caches
from simpletuner.cache.store import TensorStore
from simpletuner.cache.text import TextCache
from simpletuner.core.events import Bus
from simpletuner.core.seeds import Seeds
from simpletuner.core.types import PlannedBatch
from tests.unit.cache.setting import PLACE, dataset, latent_cache, picture, watched


@pytest.mark.parametrize("mode", [{}, {"vae_cache_ondemand": True}])
def test_every_row_of_a_batch_is_one_pictures_latents_caption_and_sample(
    tiny_sdxl: Path, tmp_path: Path, mode: dict[str, bool]
) -> None:
    for i in range(6):
        picture(tmp_path / "one" / f"picture {i}.png", i)
        picture(tmp_path / "two" / f"other {i}.png", 10 + i)
    family = watched(tiny_sdxl)
    sources = tuple(
        dataset(tmp_path, name, caption_dropout_probability=0.3, **mode) for name in ("one", "two")
    )
    latents = latent_cache(family, *sources)
    text = TextCache(family, TensorStore.open(tmp_path / "text"), PLACE)
    text.prepare([c for source in sources for c in source.all_captions()], Bus())
    latents.prepare(sources, Bus())
    caches = Caches(sources, latents, text, Seeds(3))
    planned = PlannedBatch(
        source=1,
        rows=(5, 0, 3, 0),
        occurrences=(0, 0, 1, 1),
        weights=(1.0, 1.0, 1.0, 1.0),
        positions=(0, 1, 2, 3),
        window_samples=4,
        epoch=2,
    )
    batch = caches.batch(planned)
    assert batch.latents.shape == (4, 4, 8, 8)
    assert batch.latents.dtype == torch.float32
    assert [sample.path for sample in batch.samples] == [f"other {i}.png" for i in (5, 0, 3, 0)]
    assert [sample.occurrence for sample in batch.samples] == [0, 0, 1, 1]
    for i, sample in enumerate(batch.samples):
        alone = latents.latents(sources[1], [sample], 2)[0]
        assert torch.equal(batch.latents[i], alone)
        for name, value in caches.embeds([sample.caption]).items():
            assert torch.equal(batch.embeds[name][i], value[0])
    assert torch.equal(batch.latents[1], batch.latents[3])
    caches.close()
