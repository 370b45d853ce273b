"""``simpletuner cache``: fill, count, check and clear the caches of text and pictures."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simpletuner.apps.cli import print_json
from simpletuner.apps.cli.train import open_folder, refuse_missing_folders, refuse_pending
from simpletuner.config.load import Loaded, load
from simpletuner.core.errors import CacheError
from simpletuner.core.events import Bus
from simpletuner.core.extras import require
from simpletuner.core.files import RunFolder
from simpletuner.core.table import Row, Table

HELP = """\
usage: simpletuner cache COMMAND [--config PATH | --env NAME | --example NAME] [--key value …]

Looks after the caches that the settings name, with the same arguments as `simpletuner train`.

commands:
  build   encode what is missing, as the start of a training does, and end
  status  for each cache: what the settings want of it, what is there, what they do not use
  verify  read every entry; one that is damaged is marked, and the next start encodes it again
  gc      remove what the settings do not use, and what kills have left

options:
  --json       status, verify, gc: as JSON on standard output
  --also PATH  gc: keep what these settings use too; once for each run that shares the caches
  --yes        gc: remove; without it, say only what would be removed

example: simpletuner cache gc --env my-run --also config/other/config.json --yes

gc and build need the output folder for themselves; runs elsewhere that share a cache must not train
while gc removes.

exit code: 0; 4 if verify found a damaged entry, else as `simpletuner train`
"""


@dataclass(frozen=True)
class Wanted:
    """One folder of packs, and the entries that settings want of it."""

    title: str
    folder: Path
    keys: frozenset[bytes]


def run(arguments: Sequence[str]) -> int:
    """Run one of the commands on the caches that `arguments` name."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return 0
    command = COMMANDS[arguments[0]].load()
    parser = argparse.ArgumentParser(
        prog=f"simpletuner cache {arguments[0]}",
        usage="see `simpletuner cache --help`",
        add_help=False,
        allow_abbrev=False,
    )
    if command is not build:
        parser.add_argument("--json", action="store_true")
    if command is gc:
        parser.add_argument("--yes", action="store_true")
        parser.add_argument("--also", action="append", default=[])
    options, words = parser.parse_known_args(arguments[1:])
    loaded = _load(words)
    require("torch", extra="train", why="the caches")
    from simpletuner.tracking.sinks.plain import PlainSink

    bus = Bus([PlainSink(sys.stderr)])
    try:
        code: int = command(loaded, options, bus)
    finally:
        bus.close()
    return code


def build(loaded: Loaded, options: argparse.Namespace, bus: Bus) -> int:
    """Encode what is missing."""
    from simpletuner.training.precompute import precompute

    folder = open_folder(loaded.config.runtime.output_dir)
    with folder.locked():
        trains = loaded.config.adapter.train_text_encoder
        precompute(*_front(loaded, folder, bus), bus, trains_text=trains).close()
    return 0


def status(loaded: Loaded, options: argparse.Namespace, bus: Bus) -> int:
    """Count what is wanted, there, and unused."""
    from simpletuner.cache.upkeep import survey

    found = [(each, survey(each.folder, each.keys)) for each in wanted_of([loaded], bus)]
    if options.json:
        print_json([_named(each) | asdict(counted) for each, counted in found])
        return 0
    for each, counted in found:
        missing = counted.wanted - counted.present
        print(f"{each.title}: {each.folder}")
        print(f"  {counted.present:,} of {counted.wanted:,} entries are there, {missing:,} missing")
        print(f"  {counted.packs:,} packs, {_size(counted.file_bytes)}")
        if counted.unused:
            print(f"  {counted.unused:,} entries are not used, {_size(counted.unused_bytes)}")
        if counted.unfinished:
            print(f"  {counted.unfinished:,} packs are being written, or were left by a kill")
        if counted.refused:
            print(f"  {counted.refused:,} packs cannot be read")
    return 0


def verify(loaded: Loaded, options: argparse.Namespace, bus: Bus) -> int:
    """Read every entry of every cache."""
    from simpletuner.cache.upkeep import damaged

    found = {each: damaged(each.folder) for each in wanted_of([loaded], bus)}
    if options.json:
        named = [(_named(each), [key.hex() for key in keys]) for each, keys in found.items()]
        print_json([facts | {"damaged": keys} for facts, keys in named])
    else:
        for each, keys in found.items():
            what = f"{len(keys)} damaged, encoded again by the next start" if keys else "whole"
            print(f"{each.title}: {what}")
    return CacheError.exit_code if any(found.values()) else 0


def gc(loaded: Loaded, options: argparse.Namespace, bus: Bus) -> int:
    """Remove what neither these settings nor those of `--also` use."""
    from simpletuner.cache.upkeep import collect

    others = [_load(["--config", path]) for path in options.also]
    folder = open_folder(loaded.config.runtime.output_dir)
    with folder.locked():
        mine = {each.folder for each in wanted_of([loaded], bus)}
        found = [each for each in wanted_of([loaded, *others], bus) if each.folder in mine]
        done = {each: collect(each.folder, each.keys, dry=not options.yes) for each in found}
    if options.json:
        print_json([_named(each) | asdict(removed) for each, removed in done.items()])
        return 0
    verb, more = ("removed", "") if options.yes else ("would be removed", "; add --yes")
    for each, removed in done.items():
        print(
            f"{each.title}: {removed.entries:,} entries and {removed.unfinished:,} unfinished or"
            f" unreadable packs {verb}, {_size(removed.file_bytes)}{more}"
        )
    return 0


COMMANDS = Table(
    "cache command",
    (
        Row("build", build, "encode what is missing"),
        Row("status", status, "what is there"),
        Row("verify", verify, "read every entry"),
        Row("gc", gc, "remove what is not used"),
    ),
)
"""Command → ``command(loaded, options, bus) -> exit code``."""


def wanted_of(runs: Sequence[Loaded], bus: Bus) -> list[Wanted]:
    """The cache folders of some settings, each once, and what they want of it."""
    from simpletuner.cache.controls import encoded_beside
    from simpletuner.cache.masks import MaskCache
    from simpletuner.training.precompute import open_caches

    titles: dict[Path, str] = {}
    keys: dict[Path, set[bytes]] = {}
    for loaded in runs:
        folder = RunFolder(Path(loaded.config.runtime.output_dir))
        family, sources, prompts, datasets, *rest = _front(loaded, folder, bus)
        text, latents = open_caches(family, sources, datasets, *rest, bus)
        for cache in () if loaded.config.adapter.train_text_encoder else text.all:
            place = cache.folder.resolve()
            titles.setdefault(place, "text embeddings")
            own = [source for source in sources if text.of(source.id) is cache]
            captions = {caption for source in own for caption in source.all_captions()}
            if cache is text.default:
                captions |= set(prompts.captions())
            keys.setdefault(place, set()).update(cache.keys(captions))
        for source in sources:
            if source.settings.vae_cache_disable:
                continue
            place = latents.folder(source).resolve()
            titles.setdefault(place, f"latents of {source.id}")
            wanted = keys.setdefault(place, set())
            for pictures in (source, *encoded_beside(family, [source])):
                wanted |= latents.keys(pictures)
            if (factor := latents.factor(source)) is not None:
                wanted |= MaskCache(latents.stores).keys(source, factor)
    return [Wanted(titles[place], place, frozenset(keys[place])) for place in titles]


def _front(loaded: Loaded, folder: RunFolder, bus: Bus) -> tuple[Any, ...]:
    """What the front half of a run is called with: nothing heavy is loaded."""
    from simpletuner.core.seeds import Seeds
    from simpletuner.data.opening import open_sources
    from simpletuner.models.loading import open_family
    from simpletuner.precision.dtypes import run_dtype
    from simpletuner.precision.quantise import Quantiser
    from simpletuner.runtime.runtime import Runtime
    from simpletuner.validation.prompts import Prompts

    config, datasets = loaded.config, loaded.datasets
    precision = config.precision
    root = config.cache.root(folder.root)
    batch = config.schedule.train_batch_size
    sources = open_sources(datasets, index_folder=root / "index", train_batch_size=batch, bus=bus)
    return (
        open_family(config.model, digests=root / "digests.json"),
        sources,
        Prompts.of(config.validation),
        datasets,
        config.cache,
        Quantiser(precision),
        Seeds(config.runtime.seed),
        Runtime.start(run_dtype(precision), tf32=not precision.disable_tf32).place,
    )


def _load(words: Sequence[str]) -> Loaded:
    loaded = load(words, os.environ, Path.cwd())
    refuse_pending(loaded.pending)
    refuse_missing_folders(loaded)
    return loaded


def _named(each: Wanted) -> dict[str, Any]:
    return {"title": each.title, "folder": str(each.folder)}


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
