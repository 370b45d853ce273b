"""``simpletuner data``: what a run would train on, before anything heavy is loaded."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.apps.cli import print_json
from simpletuner.apps.cli.train import refuse_missing_folders, refuse_pending
from simpletuner.config.load import Loaded, load
from simpletuner.core.errors import DataError
from simpletuner.core.events import Bus
from simpletuner.core.table import Row, Table
from simpletuner.core.text import printable
from simpletuner.tracking.sinks.plain import PlainSink

if TYPE_CHECKING:
    from simpletuner.data.source import DataSource

HELP = """\
usage: simpletuner data COMMAND [--config PATH | --env NAME | --example NAME] [--key value …]

Looks at the datasets of the settings as `simpletuner train` does, with the same arguments. Loads no
model and never writes into a dataset.

commands:
  report    found, usable, left out and why, sizes, steps and samples of an epoch
  preview   a PNG and an HTML file of the exact pixels that are trained on, each beside its picture
            with the box that is cut out, its scale and its captions
  captions  every picture with its captions
  verify    decodes every picture; those that cannot be used are remembered with their reason

options:
  --json       report, captions, verify: as JSON on standard output
  --out FILE   preview: the .png (OUTPUT_DIR/preview.png); the .html file lies beside it
  --count N    preview: pictures of each dataset (24)

example: simpletuner data preview --env my-run --count 12

exit code: 0; 3 if too many pictures of a dataset cannot be used, or if verify or preview met one
"""


def run(arguments: Sequence[str]) -> int:
    """Run one of the commands on the datasets that `arguments` name."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return 0
    command = COMMANDS[arguments[0]].load()
    parser = argparse.ArgumentParser(
        prog=f"simpletuner data {arguments[0]}",
        usage="see `simpletuner data --help`",
        add_help=False,
        allow_abbrev=False,
    )
    if command is preview:
        parser.add_argument("--out", type=Path)
        parser.add_argument("--count", type=_count, default=24)
    else:
        parser.add_argument("--json", action="store_true")
    options, words = parser.parse_known_args(arguments[1:])
    loaded = load(words, os.environ, Path.cwd())
    datasets = loaded.files[-1].name
    # What no training takes yet can be looked at all the same.
    known = [p for p in loaded.pending if p.key != "conditioning_type"]
    refuse_pending([p for p in known if p.file and Path(p.file).name == datasets])
    refuse_missing_folders(loaded)
    code: int = command(loaded, _open(loaded), options)
    return code


def report(loaded: Loaded, sources: Sequence[DataSource], options: argparse.Namespace) -> int:
    """Print the dataset report."""
    from simpletuner.core.seeds import Seeds
    from simpletuner.data.plan import BatchPlan
    from simpletuner.data.report import DataReport

    config = loaded.config
    seeds = Seeds(config.runtime.seed)
    plan = BatchPlan.of(
        sources[: len(loaded.datasets.training)],
        **config.schedule.window_shape,
        data_backend_sampling=config.data.data_backend_sampling,
        seeds=seeds,
    )
    made = DataReport.of(sources, plan)
    if options.json:
        print_json(asdict(made))
    else:
        print("\n".join(made.lines(most=1000)))
    return 0


def preview(loaded: Loaded, sources: Sequence[DataSource], options: argparse.Namespace) -> int:
    """Write the contact sheet."""
    from simpletuner.core.files import write_through, writing
    from simpletuner.data.pixels import PictureError
    from simpletuner.data.preview import chosen, look, page, sheet

    shown, damaged = [], 0
    for source in sources:
        for row in chosen(len(source), options.count):
            try:
                shown.append(look(source, row))
            except PictureError as error:
                damaged += 1
                print(error.message, file=sys.stderr)
    if not shown:
        raise DataError(
            "none of these pictures can be shown", fix="`simpletuner data verify` names all such"
        )
    file = options.out or Path(loaded.config.runtime.output_dir) / "preview.png"
    if file.suffix.lower() != ".png":
        raise DataError(f"--out {file} is not a .png", fix="the HTML file is named after it")
    picture, html = sheet(shown), page(shown).encode()
    with writing(DataError, file.name, file.parent, "name another file with --out"):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_through(file, lambda temporary: picture.save(temporary, format="PNG"))
        write_through(file.with_suffix(".html"), lambda temporary: temporary.write_bytes(html))
    print(f"{len(shown)} pictures in {file} and {file.with_suffix('.html')}")
    return DataError.exit_code if damaged else 0


def captions(loaded: Loaded, sources: Sequence[DataSource], options: argparse.Namespace) -> int:
    """Print every picture with its captions."""
    found: dict[str, dict[str, list[str]]] = {}
    for source in sources:
        texts = found.setdefault(source.id, {})
        for row in range(len(source)):
            texts[_unlike(printable(source.path(row)), texts)] = list(source.captions(row))
    if options.json:
        print_json(found)
        return 0
    for name, texts in found.items():
        for path, those in texts.items():
            print(f"{name}: {path}")
            print("\n".join(f"    {printable(text) or '(empty caption)'}" for text in those))
    return 0


def verify(loaded: Loaded, sources: Sequence[DataSource], options: argparse.Namespace) -> int:
    """Decode every picture; remember those that cannot be."""
    faults: dict[str, dict[str, str]] = {}
    for source in sources:
        faults[source.id] = _undecodable(source, source.pixels)
        if faults[source.id]:
            source.remember(faults[source.id])
        for name, _ in source.conditions:
            found = _undecodable(
                source, lambda row, of=source, n=name: of.condition(n, row, of.geometry(row))
            )
            faults[source.id] = {**found, **faults[source.id]}
        if source.masked:  # another file than the picture, which may stay as it is
            masks = _undecodable(source, lambda row, of=source: of.mask(row, of.geometry(row)))
            faults[source.id] = {**masks, **faults[source.id]}
    told: dict[str, dict[str, str]] = {}
    for source in sources:
        known = source.damaged()
        sound = len(source) - len(faults[source.id])
        named = told.setdefault(source.id, {})
        for path, reason in sorted((known | faults[source.id]).items()):
            named[_unlike(printable(path), named)] = reason
            if not options.json:
                print(f"{source.id}: {printable(path)}: {reason}")
        if not options.json:
            total = len(source) + len(known)
            print(f"{source.id}: {sound} of {total} pictures can be decoded")
    if options.json:
        print_json(told)
    return DataError.exit_code if any(told.values()) else 0


COMMANDS = Table(
    "data command",
    (
        Row("report", report, "what is found, used and left out"),
        Row("preview", preview, "the exact training pixels as one picture"),
        Row("captions", captions, "every picture's captions"),
        Row("verify", verify, "decode every picture"),
    ),
)
"""Command → ``command(loaded, sources, options) -> exit code``."""


def _open(loaded: Loaded) -> list[DataSource]:
    from simpletuner.data.opening import open_sources

    config = loaded.config
    index = config.cache.root(Path(config.runtime.output_dir)) / "index"
    bus = Bus([PlainSink(sys.stderr)])
    try:
        return open_sources(
            loaded.datasets,
            index_folder=index,
            train_batch_size=config.schedule.train_batch_size,
            bus=bus,
        )
    finally:
        bus.close()


def _undecodable(source: DataSource, look: Callable[[int], object]) -> dict[str, str]:
    """Why, by path, `look` finds that some pictures of a dataset cannot be decoded."""
    from simpletuner.data.pixels import PictureError

    def fault(row: int) -> str | None:
        try:
            look(row)
        except PictureError as error:
            whose = f"dataset {source.id}: {printable(source.path(row))} "
            return error.message.removeprefix(whose)
        return None

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        reasons = pool.map(fault, range(len(source)))
        return {source.path(row): why for row, why in enumerate(reasons) if why is not None}


def _unlike(name: str, others: Container[str]) -> str:
    """`name`, numbered where it is among `others`: two addresses may differ in their queries."""
    names = (name if number == 1 else f"{name} ({number})" for number in count(1))
    return next(each for each in names if each not in others)


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError("must be a number of pictures, 1 or more")
    return int(text)
