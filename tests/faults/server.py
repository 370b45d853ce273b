"""A process that has imported everything and forks a run for each order: a start costs a second.

Reads orders from stdin, one JSON object a line, and answers each by one line:

    {"warm": CONFIG}                            run here, so that what is imported late is there
    {"start": CONFIG, "output": FILE, …}        run in a fork; answers its process id
    {"wait": PID}                               answers how it ended, as subprocess counts it
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # runs write to what was stdout
    for line in sys.stdin:
        order = json.loads(line)
        if "warm" in order:
            answer = train(order["warm"])
            gc.collect()
            gc.freeze()  # or every fork copies all there is at its first collection
        elif "start" in order:
            answer = start(order)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        print(answer, file=answers, flush=True)


def start(order: Mapping[str, Any]) -> int:
    """Fork a run; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        from tests.faults.points import watch

        watch(order)
        code = train(order["start"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train(config: str) -> int:
    """`simpletuner train`, as the command line does it."""
    from simpletuner.apps.cli import main as simpletuner

    return simpletuner(["train", "--config", config])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
