"""``simpletuner estimate``: what a run needs, before anything is downloaded to a device."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.apps.cli import print_json
from simpletuner.apps.cli.train import refuse_missing_folders, refuse_pending
from simpletuner.config.load import load

if TYPE_CHECKING:
    from simpletuner.training.estimate import Estimate

HELP = """\
usage: simpletuner estimate [--json] [--config PATH | --env NAME | --example NAME] [--key value …]

Says how much memory a training step takes and how much disk the caches, for the settings and the
pictures of this run. The model's real architecture takes one step without weights and without a
device; nothing is trained or encoded.

  --json   the numbers in bytes, for scripts

example: simpletuner estimate --base_model_precision int8-quanto --gradient_checkpointing true
"""


def run(arguments: Sequence[str]) -> int:
    """Print the estimate."""
    if {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return 0
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    options, words = parser.parse_known_args(arguments)
    loaded = load(words, os.environ, Path.cwd())
    refuse_pending(loaded.pending)
    refuse_missing_folders(loaded)
    from simpletuner.core.events import Bus
    from simpletuner.data.opening import open_sources
    from simpletuner.models.loading import open_family
    from simpletuner.runtime.runtime import quieten_libraries
    from simpletuner.training.estimate import estimate

    config = loaded.config
    quieten_libraries()
    root = config.cache.root(Path(config.runtime.output_dir))
    sources = open_sources(
        loaded.datasets,
        index_folder=root / "index",
        train_batch_size=config.schedule.train_batch_size,
        bus=Bus(),
    )
    family = open_family(config.model, digests=root / "digests.json")
    drawn = len(loaded.datasets.training)
    found = estimate(config, family, sources[:drawn], sources[drawn:])
    if options.json:
        print_json({**asdict(found), "device": found.device})
    else:
        from simpletuner.precision.plan import plan_lines

        print("\n".join([*lines(found), *plan_lines(found.plan)]))
    return 0


def lines(found: Estimate) -> list[str]:
    """The estimate as a table."""
    rows = [
        ("the model's weights", found.base, f"{found.weights:,} weights"),
        ("of them off the device", found.waiting, "in the computer's memory, or on its disk"),
        ("text encoders", found.encoders, "which stay loaded"),
        ("adapters", found.adapters, f"{found.trained:,} weights train"),
        ("gradients", found.gradients, ""),
        ("optimizer", found.optimizer, ""),
        (
            "average",
            found.average,
            "" if found.average_on_device else "in the CPU's memory, not counted below",
        ),
        (
            "activations",
            found.activations,
            f"{found.batch} x {found.width}x{found.height} px, the largest batch",
        ),
        ("a training step", found.device, "without what the device's libraries take"),
        ("caches on the disk", found.cache, ""),
    ]
    shown = [(name, f"{size / 2**20:,.1f} MiB", note) for name, size, note in rows if size]
    wide, far = max(len(n) for n, _, _ in shown), max(len(s) for _, s, _ in shown)
    return [f"{name:<{wide}}  {size:>{far}}  {note}".rstrip() for name, size, note in shown]
