"""The data layer at a million pictures: how soon a run begins, what a step's window costs.

    python benchmarks/data.py [ROWS]

The index is synthetic: rows with a path, a digest, a size and a caption each, in 200 shapes and no
files. Start-up is what a warm start does between the listing of its folders and its first window,
all entries being in the caches: read the index, find the buckets, build the plan, describe it for
the checkpoint, find the entry of every picture and of every caption. Opening the caches is not
counted: the two tables of keys that are searched are made before. Memory is what the process holds
more afterwards, beside the rows of the index and these tables.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa

from simpletuner.cache.fingerprint import latent_keys, text_keys
from simpletuner.cache.index import Index as Entries
from simpletuner.core.events import Bus
from simpletuner.core.seeds import Seeds
from simpletuner.data.columns import COLUMNS
from simpletuner.data.index import Index
from simpletuner.data.plan import BatchPlan
from simpletuner.data.settings import DatasetSettings
from simpletuner.data.source import DataSource
from simpletuner.data.storage.local import LocalStorage

ROWS, BATCH, ACCUMULATION, WINDOWS = 1_000_000, 4, 4, 2000


def main() -> None:
    if len(sys.argv) > 2:
        _measure(Path(sys.argv[1]))
        return
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    with tempfile.TemporaryDirectory() as name:
        index = _index(Path(name))
        index.save(synthetic(rows))
        source = DataSource(_settings(Path(name)), index, index.load(), BATCH, Bus())
        for number, keys in enumerate(_keys(source)):
            (Path(name) / f"keys-{number}").write_bytes(b"".join(keys))
        # A process of its own: what making the rows took is not counted.
        subprocess.run([sys.executable, __file__, name, "measure"], check=True)


def synthetic(rows: int) -> pa.Table:
    """An index of so many pictures."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 20, (rows, 2)).astype(np.int32) * 64
    digests = pa.py_buffer(rng.integers(0, 256, rows * 16, dtype=np.uint8).tobytes())
    paths = [f"folder {i // 1000:04}/picture {i % 1000:03}.jpg" for i in range(rows)]
    columns = {
        "path": pa.array(paths),
        "size": pa.array(np.full(rows, 300_000)),
        "mtime_ns": pa.array(np.full(rows, 10**18)),
        "content": pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), rows, [None, digests]),
        "width": pa.array(sizes[:, 0]),
        "height": pa.array(sizes[:, 1]),
        "mode": pa.array(["RGB"] * rows),
        "status": pa.array(["ok"] * rows),
        "caption": pa.array([f"a picture, number {i}" for i in range(rows)], pa.large_string()),
    }
    empty = {name: pa.nulls(rows, COLUMNS.field(name).type) for name in COLUMNS.names}
    return pa.table(empty | columns, schema=COLUMNS)


def _settings(root: Path) -> DatasetSettings:
    return DatasetSettings(
        id="million", instance_data_dir=root, resolution=512, caption_strategy="textfile"
    )


def _index(root: Path) -> Index:
    return Index(root / "index.parquet", LocalStorage(root), workers=1, bus=Bus(), title="index")


def _measure(root: Path) -> None:
    settings = _settings(root)
    entries = [_known((root / f"keys-{number}").read_bytes()) for number in (0, 1)]
    ctypes.CDLL(None).malloc_trim(0)  # what making these tables left is not there to be used again
    began = time.perf_counter()
    index = _index(root)
    table = index.load()
    read = time.perf_counter()
    held = _resident()
    source = DataSource(settings, index, table, BATCH, Bus())
    found = time.perf_counter()
    with_source = _resident()
    plan = BatchPlan.of(
        [source], train_batch_size=BATCH, gradient_accumulation_steps=ACCUMULATION, seeds=Seeds(0)
    )
    built = time.perf_counter()
    identity = {f"dataset {source.id}: {name}": v for name, v in source.identity().items()}
    facts = {**plan.fingerprint, **identity}
    told = time.perf_counter()
    assert all(
        (known.locate(keys) >= 0).all() for known, keys in zip(entries, _keys(source), strict=True)
    )
    located = time.perf_counter()
    plan.window(0)
    first = time.perf_counter()
    plan.window(plan.windows_per_epoch)  # two epochs are held at most
    print(
        f"read {read - began:.2f} s, buckets {found - read:.2f} s, plan {built - found:.2f} s,"
        f" description {told - built:.2f} s, entries {located - told:.2f} s,"
        f" first window {first - located:.2f} s"
    )
    print(f"buckets {with_source - held:.0f} MB, plan {_resident() - with_source:.0f} MB")
    print(f"data-start seconds={first - began:.2f} goal<=5")
    print(f"data-window ms={1000 * _window(plan):.3f} goal<=1")
    print(f"data-memory MB={_resident() - held:.0f} goal<=150")
    state = {"data": facts, "step": 10**6, "epoch": 10, "samples_seen": 10**8}
    print(f"data-state bytes={len(json.dumps(state))} goal<=1024")


def _keys(source: DataSource) -> list[list[bytes]]:
    """The entries of a dataset's pictures and captions."""
    captions = list(source.all_captions())
    return [
        latent_keys(source.content, source.boxes(), dataset="million", model="m", dtype="d"),
        text_keys(captions, model="m", dtype="d"),
    ]


def _known(keys: bytes) -> Entries:
    """What a cache knows that holds these."""
    count = len(keys) // 16
    columns = {
        "key": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), count, [None, pa.py_buffer(keys)]
        ),
        "offset": pa.array(64 * np.arange(count)),
        "crc": pa.array(np.zeros(count, np.uint32)),
        "layout": pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), ["[]"]),
    }
    known = Entries()
    known.settle([(pa.table(columns), 0)])
    return known


def _window(plan: BatchPlan) -> float:
    """Median seconds of a window anywhere in an epoch."""
    taken = []
    for step in np.random.default_rng(1).integers(0, plan.windows_per_epoch, WINDOWS).tolist():
        began = time.perf_counter()
        plan.window(step)
        taken.append(time.perf_counter() - began)
    return median(taken)


def _resident() -> float:
    """Memory of this process in MB; Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
