"""Our whole training loop against a bare LoRA step, one of each in turn.

    python benchmarks/step.py [big | tiny] [PAIRS]

Ours is everything between two steps of a real run: the window from the packs on disk, draw,
predict, backward, clip, update, the guards and the events. The bare step runs as a duty after each
of ours, so that both see the same machine. On a machine with CUDA both run there, and each is
timed until the device has done its work.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from bare import BareStep, big_unet, make_photos

from simpletuner.config.load import load
from simpletuner.core.events import Bus
from simpletuner.core.files import RunFolder
from simpletuner.tracking.build import build_sinks
from simpletuner.training import run, trainer
from tests.tiny.build import build_sdxl

EDGE, BATCH, RANK = 256, 2, 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GOALS = {"big": "ratio={ratio:.3f} goal<=1.03", "tiny": "more={more:.1f}ms goal<=4ms"}


class Turns:
    """Times our steps and runs the bare one after each."""

    def __init__(self, bare: BareStep) -> None:
        self.bare, self.ours, self.theirs = bare, [], []
        self.mark = _now()

    def __call__(self, _state: object) -> None:
        """A step of ours is over."""
        self.ours.append(_now() - self.mark)
        began = _now()
        self.bare()
        self.mark = _now()
        self.theirs.append(self.mark - began)


def _now() -> float:
    """Seconds, when all that was begun is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    size = sys.argv[1] if len(sys.argv) > 1 else "big"
    pairs = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = build_sdxl(root / "model")
        if size == "big":
            big_unet().save_pretrained(model / "unet")
        make_photos(root / "photos", 64, (320, 320))
        (root / "multidatabackend.json").write_text(
            f'[{{"id": "p", "type": "local", "instance_data_dir": "{root}/photos", "crop": true,'
            f' "resolution": {EDGE}, "crop_style": "center"}}]'
        )
        arguments = [
            f"--data_backend_config={root}/multidatabackend.json",
            f"--output_dir={root}/out",
            f"--pretrained_model_name_or_path={model}",
            f"--train_batch_size={BATCH}",
            f"--max_train_steps={pairs + 10}",
            *"--model_family=sdxl --mixed_precision=no --gradient_checkpointing=false"
            " --validation_disable --checkpoint_step_interval=0 --lr_scheduler=constant".split(),
        ]
        turns = Turns(BareStep(model, BATCH, (EDGE // 8, EDGE // 8), RANK, DEVICE))
        _train(arguments, root, turns)
    ours, theirs = turns.ours[10:], turns.theirs[10:]
    ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
    more = 1000 * median(a - b for a, b in zip(ours, theirs, strict=True))
    print(f"ours {1000 * median(ours):.1f} ms, bare {1000 * median(theirs):.1f} ms a step")
    print(f"{len(ours)} pairs, median difference {more:.1f} ms, median ratio {ratio:.3f}")
    print(f"step-{size} {GOALS[size].format(ratio=ratio, more=more)}")


def _train(arguments: list[str], root: Path, turns: Turns) -> None:
    """A real run whose trainer has one more duty, due after every step."""
    (root / "config.json").write_text("{}")
    loaded = load([f"--config={root}/config.json", *arguments], {}, root)
    folder = RunFolder(root / "out")
    folder.root.mkdir()

    class Trainer(trainer.Trainer):
        def _count(self, state: object, window: object, outcome: object) -> None:
            super()._count(state, window, outcome)
            turns(state)

    run.Trainer = Trainer  # the benchmark's own loop: the same one, with a stop after each step
    bus = Bus(build_sinks(loaded.config.tracking, folder))
    try:
        run.train(loaded.config, loaded.datasets, folder, bus)
    finally:
        bus.close()


if __name__ == "__main__":
    main()
