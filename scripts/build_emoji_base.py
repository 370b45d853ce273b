"""Train the embedded emoji model from nothing, on a CPU, and write its folder.

    pip install -r scripts/emoji_base/requirements.txt
    python -m scripts.build_emoji_base --work WORK

Needs `npm`. Ctrl-C stops it; the same command continues. Stages: pictures, tokenizer, vae,
latents, unet, tiny_vae, clip, export (which measures too and writes contact sheets into WORK).
To do a stage again, remove its files from WORK.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

MINUTES = {"vae": 15.0, "unet": 42.0, "tiny_vae": 4.0, "clip": 15.0}
CAP_MINUTES = 180.0
SMOKE_STEPS = {"vae": 6, "unet": 6, "tiny_vae": 4, "clip": 3}


def main() -> None:
    """Run the stages that are not done."""
    options = _options()
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # before torch is there
    import torch

    from scripts.emoji_base.work import Work
    from simpletuner.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    options.work.mkdir(parents=True, exist_ok=True)
    size = {"limit": 48, "concepts": 12, "held_out": 8} if options.smoke else {}
    size.setdefault("concepts", options.concepts)
    work = Work(options.work, seed=options.seed, workers=options.workers, **size)
    _refuse_another_setting(work)
    for name, made, run in _stages(options, work):
        if not work.has(made):
            started, before = time.monotonic(), time.process_time()
            run()
            work.spend(name if name not in MINUTES else "start", time.process_time() - before)
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    print(f"{work.spent() / 60:.1f} CPU-minutes in all; the model is in {options.output}")


def _stages(
    options: argparse.Namespace, work: object
) -> list[tuple[str, str, Callable[[], object]]]:
    """Name, the file that says it is done, and what to run."""
    from scripts.emoji_base import clip, parallel, pictures, tiny_vae, tokenizer, unet, vae
    from scripts.emoji_base.work import Work

    assert isinstance(work, Work)

    def train(stage: str, make: Callable[[Work], parallel.Task]) -> None:
        cap = options.cpu_minutes * 60 - work.spent()
        if work.has(f"{stage}.checkpoint.safetensors"):
            cap += work.facts("cpu_seconds.json").get(stage, 0.0)
        seconds = options.minutes[stage] * 60
        budget = parallel.Budget(seconds, options.steps.get(stage), cap)
        if not parallel.train(stage, work, make, budget):
            raise SystemExit(
                f"{stage} is stopped at {work.spent() / 60:.1f} CPU-minutes (the cap is "
                f"{options.cpu_minutes:g}, --cpu-minutes); the same command continues"
            )

    return [
        ("pictures", "concepts.json", lambda: pictures.make_pictures(work)),
        ("tokenizer", "vocabulary.json", lambda: tokenizer.make_vocabulary(work)),
        ("vae", "vae.safetensors", lambda: train("vae", vae.VaeTask)),
        ("latents", "latents.safetensors", lambda: vae.make_latents(work)),
        ("captions", "captions.safetensors", lambda: unet.make_captions(work)),
        ("unet", "unet.safetensors", lambda: train("unet", unet.UnetTask)),
        ("tiny_vae", "tiny_vae.safetensors", lambda: train("tiny_vae", tiny_vae.TinyVaeTask)),
        ("clip", "clip.safetensors", lambda: train("clip", clip.ClipTask)),
        ("export", "measured.json", lambda: _export(work, options.output)),
    ]


def _export(work: object, target: Path) -> None:
    from scripts.emoji_base import card
    from scripts.emoji_base.measure import measure
    from scripts.emoji_base.work import Work

    assert isinstance(work, Work)
    card.export(work, target)
    card.write_card(work, target, measure(work, target))


def _refuse_another_setting(work: object) -> None:
    """A work folder continues only with the settings that it began with."""
    from scripts.emoji_base.work import Work

    assert isinstance(work, Work)
    now = {"seed": work.seed, "workers": work.workers, "concepts": work.concepts}
    now["limit"] = work.limit
    if (before := work.facts("settings.json")) and before != now:
        raise SystemExit(f"{work.folder} was begun with {before}; now it is {now}")
    work.save_facts("settings.json", now)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--output", type=Path, help="the model's folder (WORK/emoji-sdxl)")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--concepts", type=int, default=64, help="emoji that the base learns")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    known = ",".join(f"{stage}={minutes:g}" for stage, minutes in MINUTES.items())
    parser.add_argument("--minutes", type=_numbers, default={}, help=f"of each process: {known}")
    parser.add_argument("--steps", type=_numbers, default={}, help="instead of minutes: vae=4000,…")
    parser.add_argument("--cpu-minutes", type=float, default=CAP_MINUTES, help="of all processes")
    parser.add_argument("--smoke", action="store_true", help="a few pictures and steps, to try it")
    options = parser.parse_args()
    if unknown := {*options.minutes, *options.steps} - set(MINUTES):
        parser.error(f"no such stage: {', '.join(sorted(unknown))} (known: {known})")
    options.output = options.output or options.work / "emoji-sdxl"
    options.minutes = MINUTES | options.minutes
    steps = SMOKE_STEPS if options.smoke else {}
    options.steps = steps | {stage: int(number) for stage, number in options.steps.items()}
    return options


def _numbers(text: str) -> dict[str, float]:
    pairs = (part.split("=", 1) for part in text.split(","))
    return {stage.strip(): float(number) for stage, number in pairs}


if __name__ == "__main__":
    main()
