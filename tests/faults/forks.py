"""Runs in forks of a warm process, and what can be known of them from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow.parquet as pq
from PIL import Image
from safetensors import safe_open

from tests.faults import server
from tests.runs import Run

# What is promised to the bit is promised on the CPU, at one number of threads; and neither CUDA nor
# OpenMP's threads survive a fork.
_ENVIRONMENT = MappingProxyType({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (negative: a signal's number), its words, its points."""

    code: int
    output: str
    points: tuple[str, ...]


@dataclass(frozen=True)
class Going:
    """A run under way."""

    forks: Forks
    process: int
    output: Path
    record: Path

    def wait(self) -> Ended:
        """Wait for its end."""
        code = self.forks.ask({"wait": self.process})
        points = self.record.read_text().splitlines() if self.record.exists() else []
        return Ended(code, self.output.read_text(), tuple(points))


class Forks:
    """The client of `tests.faults.server`; starts it, and ends it on leaving."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = (folder / "server.log").open("w")
        self._runs = 0
        self._server = subprocess.Popen(
            [sys.executable, server.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **_ENVIRONMENT},
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)
        self._log.close()

    def ask(self, order: Mapping[str, Any]) -> int:
        """One order, one number."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def warm(self, run: Run, **settings: Any) -> None:
        """Run once inside the server: what a family imports late is there from then on."""
        assert self.ask({"warm": str(run.write(**settings))}) == 0

    def start(
        self,
        run: Run,
        plan: Mapping[str, Any] | None = None,
        *,
        root: Path | None = None,
        windows: Path | None = None,
        **settings: Any,
    ) -> Going:
        """Start a run with a plan of `tests.faults.points`; without one its points are counted.

        Args:
            root: Where the points are; the output folder if not given.
        """
        self._runs += 1
        stem = self._folder / f"run-{self._runs}"
        order: dict[str, Any] = {
            "start": str(run.write(**settings)),
            "output": str(stem.with_suffix(".txt")),
            "record": str(stem.with_suffix(".points")),
            "root": str(root or run.out),
            "plan": dict(plan or {}),
        }
        if windows is not None:
            order["windows"] = str(windows)
        process = self.ask(order)
        return Going(self, process, Path(order["output"]), Path(order["record"]))

    def hold(self, run: Run, gate: Path, plan: Mapping[str, Any], **more: Any) -> Going:
        """Start a run; it has reached the plan's point and waits there until `gate` is made."""
        going = self.start(run, {**plan, "act": "wait", "gate": str(gate)}, **more)
        until = time.monotonic() + 600
        while not Path(f"{gate}.reached").exists():
            assert time.monotonic() < until, going.output.read_text()
            time.sleep(0.01)
        return going

    def train(self, run: Run, plan: Mapping[str, Any] | None = None, **more: Any) -> Ended:
        """Start a run and wait for its end."""
        return self.start(run, plan, **more).wait()


def assert_whole(root: Path) -> None:
    """Nothing below `root` that bears its final name is a part of a file or of a checkpoint."""
    for path in root.rglob("*"):
        if any(part.endswith((".tmp", ".partial", ".removing")) for part in path.parts):
            continue
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as opened:
                assert [opened.get_tensor(name).shape for name in opened.keys()], path
        elif path.suffix == ".parquet":
            assert len(pq.read_table(path)), path
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        elif path.name.startswith("checkpoint-"):
            assert is_whole(path), path


def is_whole(checkpoint: Path) -> bool:
    """Every file of the manifest is there, to the bit; the manifest is read without our code."""
    if not (checkpoint / "manifest.json").is_file():
        return False
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return len(files) == 4 and all(
        (checkpoint / name).is_file()
        and sha256((checkpoint / name).read_bytes()).hexdigest() == facts["sha256"]
        for name, facts in files.items()
    )


def checkpoints(root: Path) -> list[str]:
    """What there is by the name of a checkpoint, whatever its state."""
    return sorted(path.name for path in root.glob("checkpoint-*"))


def newest_step(root: Path) -> int:
    """The step of the newest whole checkpoint, named or not yet; 0 without one."""
    steps = [
        int(path.name.removesuffix(".partial").removeprefix("checkpoint-"))
        for path in root.glob("checkpoint-*")
        if not path.name.endswith(".removing") and is_whole(path)
    ]
    return max(steps, default=0)


def sealed_keys(cache: Path) -> set[str]:
    """Keys of the entries in sealed packs, from the packs' own headers."""
    keys = set()
    for pack in cache.rglob("*.safetensors"):
        with safe_open(pack, "pt") as opened:
            keys |= {name.split(".")[0] for name in opened.keys() if "." in name}
    return keys


def encoded_at_start(events: Sequence[Mapping[str, Any]], stage: str) -> int | None:
    """Entries a start set out to encode; None if it did not come to say so."""
    for event in events:
        if event["event"] == "stage" and event["stage"] == stage:
            return 0 if "in the cache" in event["note"] else int(event["total"])
    return None


def leavings(root: Path) -> list[str]:
    """What was begun and not ended in an output folder, its caches aside."""
    folders = [root, root / "validation_images", root / "benchmarks/base_model"]
    found = [file for f in (*folders, *root.glob("checkpoint-*")) for file in f.glob("*")]
    return [str(path) for path in found if path.suffix in (".tmp", ".partial", ".removing")]
