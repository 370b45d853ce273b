"""A whole small run, cold and warm, against the sum of its bare parts.

    python benchmarks/small_run.py

120 pictures and 60 steps at 256 px on the tiny SDXL, five rounds of everything, one after the
other. The bare parts are importing what training needs, encoding the captions and pictures in a
plain loop, and 60 bare steps; 3 s are allowed for everything else: settings, index, packs, guards,
checkpoint, verification. Medians are compared.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from bare import BareStep, encode, make_photos, write_run

from tests.tiny.build import build_sdxl

PICTURES, STEPS, EDGE, BATCH, ALLOWED, ROUNDS = 120, 60, 256, 2, 3.0, 5
BARE = ("imports", "bare encode", "bare steps")
IMPORTS = "import torch, diffusers, transformers, peft; diffusers.StableDiffusionXLPipeline"


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = build_sdxl(root / "model")
        photos = make_photos(root / "photos", PICTURES, (400, 400))
        rounds = [_round(root / str(number), model, photos) for number in range(ROUNDS)]
    took = {part: median(each[part] for each in rounds) for part in rounds[0]}
    for part, middle in took.items():
        every = " ".join(f"{each[part]:.2f}" for each in rounds)
        print(f"{part:<16} {middle:6.2f} s  of {every}")
    allowed = sum(took[part] for part in BARE) + ALLOWED
    print(f"small-run-warm ratio={took['ours, warm'] / allowed:.3f} goal<=1.0")
    print(f"small-run-cold ratio={took['ours, cold'] / allowed:.3f} goal<=1.0")


def _round(root: Path, model: Path, photos: Path) -> dict[str, float]:
    root.mkdir()
    step = BareStep(model, BATCH, (EDGE // 8, EDGE // 8))
    command = _ours(root, model, photos)
    calls = {
        "imports": lambda: _run([sys.executable, "-c", IMPORTS]),
        "bare encode": lambda: encode(model, sorted(photos.iterdir()), EDGE),
        "bare steps": lambda: [step() for _ in range(STEPS)],
        "ours, cold": lambda: _run(command),
        "ours, warm": lambda: _run([*command, "--resume_from_checkpoint=none"]),
    }
    return {part: seconds(call) for part, call in calls.items()}


def _ours(root: Path, model: Path, photos: Path) -> list[str]:
    entry = {"id": "p", "type": "local", "instance_data_dir": str(photos), "crop": True}
    entry |= {"crop_style": "center", "resolution": EDGE}
    more = {"train_batch_size": BATCH, "max_train_steps": STEPS}
    config = write_run(root, model, entry, **more)
    return [sys.executable, "-m", "simpletuner", "train", f"--config={config}"]


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
