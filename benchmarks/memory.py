"""Peak memory of a run of ours against the bare loop's, each in a process of its own.

    python benchmarks/memory.py

Both encode 16 captions and pictures, let the encoders go and train 4 steps: 48.8 M parameters,
batch 16 at 256 px, fp32; five of each in turn, and medians. The peak is the kernel's own count.
What ours needs more is constant: the imports (pyarrow, rich, pydantic) and what the encoders left
in the allocator.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from bare import BareStep, big_unet, encode, make_photos, write_run

from tests.tiny.build import build_sdxl

STEPS, EDGE, BATCH, ROUNDS = 4, 256, 16, 5


def main() -> None:
    if len(sys.argv) > 1:
        _bare(Path(sys.argv[1]), Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = build_sdxl(root / "model")
        big_unet().save_pretrained(model / "unet")
        photos = make_photos(root / "photos", 16, (320, 320))
        ratios = []
        for number in range(ROUNDS):
            bare = _peak([sys.executable, __file__, str(model), str(photos)])
            ours = _peak(_ours(root / str(number), model, photos))
            print(f"bare {bare:.0f} MB, ours {ours:.0f} MB")
            ratios.append(ours / bare)
    print(f"memory ratio={median(ratios):.3f} goal<=1.05")


def _bare(model: Path, photos: Path) -> None:
    encode(model, sorted(photos.iterdir()), EDGE)
    step = BareStep(model, BATCH, (EDGE // 8, EDGE // 8))
    for _ in range(STEPS):
        step()


def _ours(root: Path, model: Path, photos: Path) -> list[str]:
    root.mkdir()
    entry = {"id": "p", "instance_data_dir": str(photos), "crop": True, "resolution": EDGE}
    more = {"train_batch_size": BATCH, "max_train_steps": STEPS}
    config = write_run(root, model, entry, **more)
    return [sys.executable, "-m", "simpletuner", "train", f"--config={config}"]


def _peak(command: list[str]) -> float:
    """Largest resident size in MB of a command, told by the process that waited for it."""
    script = (
        "import resource, subprocess, sys;"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command], check=True, capture_output=True, text=True
    )
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return int(done.stdout.split()[-1]) / unit


if __name__ == "__main__":
    main()
