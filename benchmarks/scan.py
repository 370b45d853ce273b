"""The scan of a folder: how fast headers are read, and what a second start costs.

    python benchmarks/scan.py [PICTURES]

The header stage is what tells the size, orientation and mode of a picture whose bytes are in memory
(JPEG of 0.8 megapixels), on one core. The second start is `simpletuner cache build` on a folder in
which nothing changed: it lists, finds everything encoded, and opens no encoder.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bare import make_photos, write_run
from PIL import Image

from simpletuner.apps.cli import main as simpletuner
from simpletuner.data.probe import probe
from tests.tiny.build import build_sdxl

PHOTOS, ROUNDS = 20, 200


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        _headers(root)
        _second_start(root, count)


def _headers(root: Path) -> None:
    photos = make_photos(root / "photos", PHOTOS, (1024, 768))
    held = [path.read_bytes() for path in sorted(photos.iterdir())]
    began = time.perf_counter()
    for _ in range(ROUNDS):
        for data in held:
            assert not isinstance(probe(data), str)
    rate = PHOTOS * ROUNDS / (time.perf_counter() - began)
    print(f"scan-header files_per_second={rate:.0f} goal>=3000")


def _second_start(root: Path, count: int) -> None:
    model, folder = build_sdxl(root / "model"), root / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05}.png", compress_level=1)
    entry = {
        "id": "p",
        "instance_data_dir": str(folder),
        "resolution": 64,
        "caption_strategy": "instanceprompt",
        "instance_prompt": "a picture",
        "vae_batch_size": 16,
    }
    config = write_run(root, model, entry, max_train_steps=1)
    command = ["cache", "build", "--config", str(config)]
    began = time.perf_counter()
    assert simpletuner(command) == 0
    first = time.perf_counter()
    packs = sorted((root / "out/cache").rglob("*.safetensors"))
    assert simpletuner(command) == 0
    second = time.perf_counter() - first
    encoded = len(set((root / "out/cache").rglob("*.safetensors")) - set(packs))
    print(f"first start {first - began:.1f} s with imports, for {count} pictures")
    print(f"scan-second-start seconds={second:.2f} new_packs={encoded} goal<=5 and 0")


if __name__ == "__main__":
    main()
