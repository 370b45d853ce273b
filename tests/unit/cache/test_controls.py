"""Control pictures as a batch has them: cut as their pictures, encoded once, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

from simpletuner.cache.controls import ControlCache, encoded_beside
from simpletuner.cache.latents import LatentCache, open_stores
from simpletuner.cache.settings import CacheSettings
from simpletuner.core.events import Bus
from simpletuner.core.seeds import Seeds
from simpletuner.core.types import Sample
from simpletuner.data.source import DataSource
from simpletuner.models.family import Family
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings
from tests.unit.cache.setting import PLACE, dataset, picture

SEEDS = Seeds(3)
ROWS = (3, 0, 2, 3)
SIZES = ((96, 64), (80, 80), (64, 96), (128, 64))
MODES: list[dict[str, Any]] = [
    {},
    {"vae_cache_ondemand": True},
    {"vae_cache_disable": True, "crop_style": "random"},
]


def negatives(root: Path, **more: Any) -> DataSource:
    """Pictures of several shapes, cut to squares, with their negatives in another format."""
    (root / "edges").mkdir(parents=True)
    for number, size in enumerate(SIZES):
        with Image.open(picture(root / "set" / f"{number}.png", number, size)) as image:
            ImageOps.invert(image).save(root / "edges" / f"{number}.webp", lossless=True)
    cut = {"crop": True, "crop_aspect": "square", "crop_style": "corner"}
    return dataset(root, control="edges", **(cut | more))


def opened(name: str, folder: Path, source: DataSource) -> tuple[Family, LatentCache, ControlCache]:
    model = ModelSettings(model_family=name, pretrained_model_name_or_path=str(folder))
    family = open_family(model)
    beside = encoded_beside(family, [source])
    stores = open_stores([source, *beside])
    latents = LatentCache(family, stores, CacheSettings(), PLACE, SEEDS)
    latents.prepare([source], Bus(), beside)
    return family, latents, ControlCache(latents, [source], family)


def draws(source: DataSource, epoch: int = 0) -> list[Sample]:
    return [source.sample(row, epoch, i, SEEDS) for i, row in enumerate(ROWS)]


def pixels_of(source: DataSource, sample: Sample) -> torch.Tensor:
    """[3, H, W] in [0, 1]: the negative of what the encoder sees of a draw."""
    return 1 - torch.from_numpy(source.pixels(sample)).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("mode", MODES)
def test_a_unets_net_sees_the_pixels_of_each_draw(
    tmp_path: Path, tiny_sd1x: Path, mode: dict[str, Any]
) -> None:
    source = negatives(tmp_path, **mode)
    _, _, cache = opened("sd1x", tiny_sd1x, source)
    samples = draws(source)
    (found,) = cache.controls(source, ROWS, samples, 0).values()
    assert found.shape == (4, 3, 64, 64)
    assert found.dtype == torch.float32
    for seen, sample in zip(found, samples, strict=True):
        torch.testing.assert_close(seen, pixels_of(source, sample), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_sd3s_net_sees_latents_of_each_draw_which_do_not_depend_on_the_others(
    tmp_path: Path, tiny_sd3: Path, mode: dict[str, Any]
) -> None:
    source = negatives(tmp_path, **mode)
    family, latents, cache = opened("sd3", tiny_sd3, source)
    samples = draws(source)
    (found,) = cache.controls(source, ROWS, samples, 0).values()
    assert found.shape == (4, 16, 8, 8)
    vae = family.open_vae(PLACE.device, PLACE.dtype)
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    for i, sample in enumerate(samples):
        with torch.no_grad():
            posterior = vae.encode(pixels_of(source, sample)[None] * 2 - 1).latent_dist
        drawn = (found[i] / scale + shift - posterior.mean[0]) / posterior.std[0]  # normal noise
        assert 0.8 < drawn.std() < 1.2
        assert abs(drawn.mean()) < 0.2
        one = cache.controls(source, ROWS[i : i + 1], [sample], 0)["controlnet_cond"][0]
        torch.testing.assert_close(one, found[i], atol=1e-5, rtol=1e-5)
    later = cache.controls(source, ROWS, draws(source, epoch=1), 1)["controlnet_cond"]
    assert torch.equal(later, found) == ("vae_cache_disable" not in mode)
    latents.close()
    if not mode:  # an own entry for each picture and for each control picture
        (pictures,) = encoded_beside(family, [source])
        assert len(latents.keys(source) | latents.keys(pictures)) == 2 * len(SIZES)


def test_pictures_without_control_pictures_have_no_controls(tmp_path: Path, tiny_sd3: Path) -> None:
    picture(tmp_path / "set/a.png", 0)
    source = dataset(tmp_path)
    _, _, cache = opened("sd3", tiny_sd3, source)
    assert cache.controls(source, (0,), [source.sample(0, 0, 0, SEEDS)], 0) == {}
    assert cache.first is None
