"""A planned batch becomes tensors that belong together."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.cache.caches import Caches
from simpletuner.cache.controls import ControlCache
from simpletuner.cache.latents import LatentCache, open_stores
from simpletuner.cache.masks import MaskCache
from simpletuner.cache.store import TensorStore
from simpletuner.cache.text import TextCache, TextCaches
from simpletuner.core.events import Bus
from simpletuner.core.seeds import Seeds
from simpletuner.core.types import PlannedBatch
from tests.unit.cache.setting import (
    PLACE,
    Watched,
    dataset,
    latent_cache,
    picture,
    read,
    watched,
)

SEEDS = Seeds(3)


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
    text = TextCaches(TextCache(family, TensorStore.open(tmp_path / "text"), PLACE), {})
    text.prepare({source.id: source.all_captions() for source in sources}, [], Bus())
    latents.prepare(sources, Bus())
    masks, controls = MaskCache(latents.stores), ControlCache(latents, sources, family)
    caches = Caches(sources, latents, text, Seeds(3), masks, controls)
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


MODES = ({}, {"vae_cache_ondemand": True}, {"vae_cache_disable": True})


@pytest.mark.parametrize("mode", MODES, ids=["ahead", "on demand", "never kept"])
def test_latents_caption_and_mask_of_a_draw_belong_to_one_picture(
    tiny_sdxl: Path, tmp_path: Path, mode: dict[str, bool]
) -> None:
    """For batches of 1 to 8 with an unreadable picture in the middle, and another ahead."""
    settings = {"caption_strategy": "textfile", "caption_dropout_probability": 0, **mode}
    names = [f"{i}.png" for i in range(10)]
    for i, name in enumerate(names):
        # What belongs to a picture says so itself; and each is alone in a dataset of its own.
        for root in (tmp_path / "all", tmp_path / "alone" / str(i)):
            picture(root / "set" / name, i).with_suffix(".txt").write_text(f"caption {i}")
            (root / "masks").mkdir(exist_ok=True)
            Image.new("L", (40, 40), 20 * i).save(root / "masks" / name)
    (tmp_path / "all/set/4.png").write_bytes(b"no picture")
    if not mode:
        torn = tmp_path / "all/set/5.png"
        torn.write_bytes(torn.read_bytes()[:-60])
    family = watched(tiny_sdxl)
    latents, text = open_caches(family, tmp_path / "all", settings)
    source = dataset(tmp_path / "all", "set", "masks", **settings)
    (source,) = latents.prepare([source], Bus())
    text.prepare({source.id: source.all_captions()}, [], Bus())
    masks = MaskCache(latents.stores)
    caches = Caches(
        (source,), latents, text, SEEDS, masks, ControlCache(latents, (source,), family)
    )
    numbers = [int(Path(source.path(row)).stem) for row in range(len(source))]
    assert numbers == [i for i in range(10) if i != 4 and (mode or i != 5)]
    expected = [alone(family, tmp_path / "alone" / str(i), settings) for i in numbers]

    for size in range(1, 9):
        rows = tuple((3 + 5 * i) % len(numbers) for i in range(size))
        batch = caches.batch(planned(rows))
        assert batch.mask is not None
        for i, row in enumerate(rows):
            number, latent = numbers[row], batch.latents[i]
            assert batch.samples[i].caption == f"caption {number}"
            for name, value in caches.embeds([f"caption {number}"]).items():
                assert torch.equal(batch.embeds[name][i], value[0])
            torch.testing.assert_close(latent, expected[row], atol=1e-4, rtol=1e-4)
            assert torch.allclose(batch.mask[i], torch.tensor(20 * number / 255))
    caches.close()


def test_a_mask_is_the_share_of_each_latent_cell_that_is_white(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    picture(tmp_path / "set/a.png", 0, (64, 64))
    (tmp_path / "masks").mkdir()
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :20] = 255
    Image.fromarray(mask).save(tmp_path / "masks/a.png")
    source = dataset(tmp_path, "set", "masks", masked_loss_probability=0.5)
    draws = [source.sample(0, epoch, 0, SEEDS) for epoch in range(20)]
    on = next(sample for sample in draws if sample.masked)
    off = next(sample for sample in draws if not sample.masked)

    caches = MaskCache({}), MaskCache(open_stores([source]))
    for cache in caches * 2:  # made anew, and kept
        found = cache.masks(source, (0, 0), (off, on), (8, 8))

        assert found is not None
        assert (found[0] == 1).all()
        assert found[1, 0, 0].tolist() == [1, 1, 0.5, 0, 0, 0, 0, 0]
        assert cache.masks(source, (0,), (off,), (8, 8)) is None


@pytest.mark.parametrize("alpha", [False, True])
def test_a_mask_is_decoded_once_and_read_from_then_on(tmp_path: Path, alpha: bool) -> None:
    picture(tmp_path / "set/a.png", 0, (64, 64))
    (tmp_path / "masks").mkdir()
    for name, mode in (("masks/a.png", "L"), ("set/a.png", "RGBA")):
        if mode == "L" or alpha:
            Image.effect_noise((64, 64), 99).convert(mode).save(tmp_path / name)
    more = {"alpha_as_mask": True} if alpha else {}
    source = dataset(tmp_path, "set", "" if alpha else "masks", **more)
    sample = source.sample(0, 0, 0, SEEDS)
    opened: list[str] = []
    listening = True
    sys.addaudithook(
        lambda event, args: listening and event == "open" and opened.append(str(args[0]))
    )
    held = "set/a.png" if alpha else "masks/a.png"

    def reads() -> int:
        found = sum(name.endswith(held) for name in opened)
        opened.clear()
        return found

    store = open_stores([source])
    first = MaskCache(store).masks(source, (0,), (sample,), (8, 8))
    assert reads() == 1
    again = MaskCache(store).masks(source, (0,), (sample,), (8, 8))
    store[source.id].seal()
    later = MaskCache(open_stores([source])).masks(source, (0,), (sample,), (8, 8))
    assert reads() == 0
    listening = False
    assert first is not None
    assert again is not None
    assert later is not None
    assert torch.equal(first, again)
    assert torch.equal(first, later)
    assert len(MaskCache(open_stores([source])).keys(source, 8)) == 1

    Image.new("RGBA" if alpha else "L", (64, 64)).save(tmp_path / held)
    changed = dataset(tmp_path, "set", "" if alpha else "masks", **more)
    assert MaskCache(open_stores([changed])).keys(changed, 8) == set()


def planned(rows: tuple[int, ...]) -> PlannedBatch:
    count = len(rows)
    return PlannedBatch(
        source=0,
        rows=rows,
        occurrences=(0,) * count,
        weights=(1.0,) * count,
        positions=tuple(range(count)),
        window_samples=count,
        epoch=0,
    )


def open_caches(
    family: Watched, root: Path, settings: dict[str, Any]
) -> tuple[LatentCache, TextCache]:
    latents = latent_cache(family, dataset(root, "set", **settings, allow_excluded=True), seed=3)
    return latents, TextCaches(TextCache(family, TensorStore.open(root / "text"), PLACE), {})


def alone(family: Watched, root: Path, settings: dict[str, Any]) -> torch.Tensor:
    """The latents of the only picture there is."""
    latents, _ = open_caches(family, root, settings)
    (source,) = latents.prepare([dataset(root, "set", **settings)], Bus())
    found = read(latents, source, 0)
    latents.close()
    return found
