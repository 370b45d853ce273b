"""A whole small run, cold and warm, against the sum of its bare parts.

    python benchmarks/small_run.py

120 pictures and 60 steps at 256 px on the tiny SDXL. The bare parts are measured in the same run:
importing what training needs, encoding the captions and pictures in a plain loop, 60 bare steps;
3 s are allowed for everything else: settings, index, packs, guards, checkpoint, verification.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bare import BareStep, encode, make_photos

from tests.tiny.build import build_sdxl

PICTURES, STEPS, EDGE, BATCH, ALLOWED = 120, 60, 256, 2, 3.0
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
        step = BareStep(model, BATCH, (EDGE // 8, EDGE // 8))
        parts = {
            "imports": seconds(lambda: _run([sys.executable, "-c", IMPORTS])),
            "bare encode": seconds(lambda: encode(model, sorted(photos.iterdir()), EDGE)),
            f"{STEPS} bare steps": seconds(lambda: [step() for _ in range(STEPS)]),
        }
        command = _ours(root, model, photos)
        cold = seconds(lambda: _run(command))
        warm = seconds(lambda: _run([*command, "--resume_from_checkpoint=none"]))
    for part, took in parts.items():
        print(f"{part:<16} {took:6.2f} s")
    print(f"ours, cold       {cold:6.2f} s\nours, warm       {warm:6.2f} s")
    allowed = sum(parts.values()) + ALLOWED
    print(f"small-run-warm ratio={warm / allowed:.3f} goal<=1.0")
    print(f"small-run-cold ratio={cold / allowed:.3f} goal<=1.0")


def _ours(root: Path, model: Path, photos: Path) -> list[str]:
    entry = {"id": "p", "type": "local", "instance_data_dir": str(photos), "crop": True}
    entry |= {"crop_style": "center", "resolution": EDGE}
    (root / "multidatabackend.json").write_text(json.dumps([entry]))
    settings = {
        "model_family": "sdxl",
        "pretrained_model_name_or_path": str(model),
        "output_dir": str(root / "out"),
        "mixed_precision": "no",
        "gradient_checkpointing": False,
        "train_batch_size": BATCH,
        "max_train_steps": STEPS,
        "validation_disable": True,
    }
    (root / "config.json").write_text(json.dumps(settings))
    return [sys.executable, "-m", "simpletuner", "train", f"--config={root}/config.json"]


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
