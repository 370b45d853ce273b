"""How long `simpletuner --help` takes, against importing what training needs.

    python benchmarks/startup.py

The two commands take turns, so that a busy machine slows both; medians are compared.
"""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

ROUNDS = 5
OURS = (sys.executable, "-m", "simpletuner", "--help")
REFERENCE = (sys.executable, "-c", "import torch, diffusers")


def seconds(command: tuple[str, ...]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    seconds(OURS), seconds(REFERENCE)  # fills the disk's cache
    rounds = [(seconds(OURS), seconds(REFERENCE)) for _ in range(ROUNDS)]
    ours, reference = (median(times) for times in zip(*rounds, strict=True))
    print(f"simpletuner --help       {ours:.3f} s")
    print(f"import torch, diffusers  {reference:.3f} s")
    print(f"startup ratio={ours / reference:.3f} goal<=0.20")


if __name__ == "__main__":
    main()
