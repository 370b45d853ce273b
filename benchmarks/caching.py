"""Our latent caching against a bare loop of the encoder on pictures that are decoded already.

    python benchmarks/caching.py [PICTURES]

The encoder costs at least ten times what decoding a picture does, as a real one does. Ours opens
the encoder, decodes, resizes, encodes and writes packs; the bare loop only encodes. Both run in one
process, one after the other, with one thread for the encoder.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from bare import big_vae, make_photos, pixels_of

from simpletuner.cache.latents import LatentCache, open_stores
from simpletuner.cache.settings import CacheSettings
from simpletuner.core.events import Bus
from simpletuner.core.seeds import Seeds
from simpletuner.core.types import Place
from simpletuner.data.settings import DatasetSettings, DataSettings, inherit
from simpletuner.data.source import DataSource
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings
from tests.tiny.build import build_sdxl

EDGE, ROUNDS, WIDTH = 256, 5, 24


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = build_sdxl(root / "model")
        big_vae(WIDTH).save_pretrained(model / "vae")
        settings = ModelSettings(model_family="sdxl", pretrained_model_name_or_path=str(model))
        family = open_family(settings)
        place = Place(torch.device("cpu"), torch.float32)
        photos = make_photos(root / "photos", count, (512, 512))
        began = time.perf_counter()
        pixels = torch.cat(list(pixels_of(sorted(photos.iterdir()), EDGE)))
        decoding = time.perf_counter() - began
        ratios, dear = [], []
        for number in range(ROUNDS):
            ours = _ours(family, root / f"cache-{number}", photos, place)
            encoding = _bare(family, pixels, place)
            ratios.append(encoding / ours)
            dear.append(encoding / decoding)
            print(f"bare encoder {encoding:.2f} s, ours {ours:.2f} s for {count} pictures")
    print(f"the encoder costs {median(dear):.1f} times what decoding does")
    assert median(dear) >= 10, "the encoder is too cheap for this comparison; raise WIDTH"
    print(f"caching ratio={median(ratios):.3f} goal>=0.9")


def _bare(family: object, pixels: torch.Tensor, place: Place) -> float:
    vae = family.open_vae(place.device, place.dtype)
    began = time.perf_counter()
    with torch.no_grad():
        for first in range(0, len(pixels), 4):
            vae.encode(pixels[first : first + 4]).latent_dist.sample()
    return time.perf_counter() - began


def _ours(family: object, cache: Path, photos: Path, place: Place) -> float:
    entry = DatasetSettings(id="p", instance_data_dir=photos, crop=True, crop_style="center")
    resolved = inherit(entry, DataSettings(resolution=EDGE), vae_root=cache)
    source = DataSource.open(resolved, index_folder=cache / "index", bus=Bus())
    stores = open_stores([source])
    latents = LatentCache(family, stores, CacheSettings(), place, Seeds(0))
    began = time.perf_counter()
    latents.prepare([source], Bus())
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
