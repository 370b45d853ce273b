"""The events of a small run, as the trainer tells them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from simpletuner.core.events import (
    CheckpointSaved,
    Event,
    ImagesMade,
    Notice,
    RunFinished,
    RunStarted,
    Stage,
    StageProgress,
    StepDone,
)


def step(number: int, *, at: float = 0.0, total: int = 60, seconds: float = 0.5) -> StepDone:
    """One step of `total`."""
    return StepDone(
        at=at,
        step=number,
        total_steps=total,
        epoch=0,
        loss=0.25,
        lr=1e-4,
        grad_norm=0.1,
        seconds=seconds,
        samples=4 * number,
    )


def small_run(root: Path) -> Iterator[Event]:
    """Two stages, three steps, a checkpoint and a picture."""
    yield Stage(at=0, stage="text embeddings", state="running", total=128)
    yield StageProgress(at=1, stage="text embeddings", state="running", done=64, total=128)
    yield Stage(at=2.5, stage="text embeddings", state="finished", done=128, total=128)
    yield Stage(at=3, stage="latents", state="running")
    yield Stage(at=3, stage="latents", state="finished", note="nothing to encode")
    yield RunStarted(at=3, summary={"model": "sdxl [base]"}, total_steps=3, first_step=1)
    yield Notice(at=3, level="warning", text="one picture [a.png] was left out")
    yield step(1, at=4, total=3)
    yield step(2, at=5, total=3)
    yield ImagesMade(at=90, step=2, images=[root / "step_2_a_0_64x64.png"], seconds=85.0)
    yield step(3, at=91, total=3)
    yield CheckpointSaved(at=92, step=3, folder=root / "checkpoint-3", seconds=0.5)
    yield RunFinished(
        at=93, step=3, weights=root / "w.safetensors", verified="yes", lines=["weights: here"]
    )
