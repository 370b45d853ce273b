"""The command ``simpletuner``: sub-commands, and where errors become exit codes."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import simpletuner
from simpletuner.core.errors import SimpleTunerError
from simpletuner.core.table import Row, Table
from simpletuner.core.text import LARGE_PICTURE

log = logging.getLogger(__name__)

COMMANDS = Table(
    "command",
    (
        Row(
            "configure",
            "simpletuner.apps.cli.configure:run",
            "write the settings files to start from",
        ),
        Row("check", "simpletuner.apps.cli.check:run", "validate the settings, run nothing"),
        Row("data", "simpletuner.apps.cli.data:run", "show what would be trained on"),
        Row("cache", "simpletuner.apps.cli.cache:run", "fill, count, check and clear the caches"),
        Row(
            "estimate",
            "simpletuner.apps.cli.estimate:run",
            "say what memory and disk a run takes",
        ),
        Row("train", "simpletuner.apps.cli.train:run", "train a model"),
        Row(
            "export",
            "simpletuner.apps.cli.export:run",
            "write what a run trained in another tool's layout",
        ),
        Row(
            "convert-lora",
            "simpletuner.apps.cli.convert_lora:run",
            "write any LoRA or LyCORIS in another tool's layout",
        ),
        Row("options", "simpletuner.apps.cli.options:run", "explain the settings"),
    ),
)
"""Sub-command → ``run(arguments) -> exit code``, imported on use."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code is 0, that of the error's kind, or 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    warnings.filterwarnings("ignore", message=LARGE_PICTURE)
    try:
        name, arguments = _command(words)
        code: int = COMMANDS[name].load()(arguments) if name else 0
        return code
    except SimpleTunerError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough: `simpletuner options | head`
        sys.stderr.close()
        return 141
    except Exception as error:  # door 1 of 4: the command line
        file = write_traceback()
        print(
            f"{type(error).__name__}: {error}\n  this is a fault of the program; "
            f"its traceback is in {file}",
            file=sys.stderr,
        )
        return 1
    finally:
        _close_logs()


def _command(words: list[str]) -> tuple[str, list[str]]:
    """The sub-command and its arguments; help and version end the program."""
    width = max(len(name) for name in COMMANDS)
    parser = argparse.ArgumentParser(
        prog="simpletuner",
        description=simpletuner.__doc__,
        usage="simpletuner COMMAND [--key value | key=value …]",
        epilog="commands:\n"
        + "\n".join(f"  {name:<{width}}  {row.summary}" for name, row in COMMANDS.items())
        + "\n\n`simpletuner COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=simpletuner.__version__)
    parser.add_argument("command", nargs="?", default="", help=argparse.SUPPRESS)
    name = str(parser.parse_args(words[:1]).command)
    if not name:
        parser.print_help()
    return name, words[1:]


def print_json(value: Any) -> None:
    """What a script reads, on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def write_traceback() -> Path:
    """Log the exception being handled; the file it went to."""
    files = [Path(handler.baseFilename) for handler in _file_handlers()]
    if not files:
        descriptor, name = tempfile.mkstemp(prefix="simpletuner-", suffix=".log")
        os.close(descriptor)
        files = [log_to(Path(name))]
    log.exception("the command line ended with an unexpected error")
    return files[0]


class _LogFile(logging.FileHandler):
    """A log that falls silent where the disk refuses it: it must not hide what the user is told."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the library's name
        """Drop the line."""

    def close(self) -> None:
        """Close the file, whatever could not be flushed."""
        with suppress(OSError):
            super().close()


def log_to(file: Path) -> Path:
    """Send developers' lines and tracebacks to `file` until the command ends."""
    handler = _LogFile(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("simpletuner")
    logger.addHandler(handler)
    logger.setLevel(os.environ.get("SIMPLETUNER_LOG_LEVEL", "INFO").upper())
    return file


def _file_handlers() -> list[logging.FileHandler]:
    handlers = logging.getLogger("simpletuner").handlers
    return [handler for handler in handlers if isinstance(handler, logging.FileHandler)]


def _close_logs() -> None:
    for handler in _file_handlers():
        logging.getLogger("simpletuner").removeHandler(handler)
        handler.close()
