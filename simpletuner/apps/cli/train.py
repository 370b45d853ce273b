"""``simpletuner train``: from the arguments to a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from simpletuner.apps.cli import log_to
from simpletuner.config.load import Loaded, load
from simpletuner.core.errors import ConfigError, DataError, Problem, SimpleTunerError
from simpletuner.core.events import Bus, RunFailed
from simpletuner.core.extras import require
from simpletuner.core.files import RunFolder

HELP = """\
usage: simpletuner train [--config PATH | --env NAME | --example NAME] [--key value …]

Trains what the settings describe. Every setting may be given as --key value, --key=value or
key=value, and then wins over the environment, which wins over the file. `simpletuner options`
lists them.

  --config PATH   a settings file (.json, .toml or .env), or the folder it is in
  --env NAME      config/NAME/, as ENV=NAME does
  --example NAME  an example that the product ships, as ENV=examples/NAME does
  without any     config/config.json, .toml or .env, or the same beside you

exit code: 0 trained; 2 settings, 3 data, 4 cache, 5 model, 6 missing package, 7 training, 8 upload;
           130 or 143 stopped, and saved if it was training;
           1 anything else, with a traceback in the log file
"""


def run(arguments: Sequence[str]) -> int:
    """Train what the settings that `arguments` name describe."""
    if {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return 0
    loaded = load(arguments, os.environ, Path.cwd())
    refuse_pending(loaded.pending)
    refuse_missing_folders(loaded)
    for name, value in loaded.exports.items():
        os.environ.setdefault(name, value)  # a shell-syntax file's exports; the shell's own win
    folder = open_folder(loaded.config.runtime.output_dir)
    with folder.locked():
        log_to(folder.log)
        _train(loaded, folder)
    return 0


def refuse_pending(pending: Sequence[Problem]) -> None:
    """Refuse settings that are not built yet.

    Raises:
        ConfigError: Names each of them.
    """
    if pending:
        raise ConfigError(
            problems=pending, fix="remove these settings; `simpletuner check` shows the rest"
        )


def refuse_missing_folders(loaded: Loaded) -> None:
    """Refuse datasets whose folder is not there.

    Raises:
        DataError: Names each of them.
    """
    missing = [
        f"{entry.id}: instance_data_dir {entry.instance_data_dir} "
        + ("is a file, not a folder" if entry.instance_data_dir.exists() else "does not exist")
        for entry in loaded.datasets.all
        if entry.instance_data_dir is not None and not entry.instance_data_dir.is_dir()
    ]
    if missing:
        raise DataError(
            "\n".join(dict.fromkeys(missing)),
            fix="correct the path, or set the entry disabled: true",
        )


def open_folder(output_dir: str | Path) -> RunFolder:
    """The output folder, made if it is not there.

    Raises:
        ConfigError: It cannot be made.
    """
    root = Path(output_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {root} cannot be made: {error.strerror}") from None
    return RunFolder(root)


def _train(loaded: Loaded, folder: RunFolder) -> None:
    from simpletuner.tracking.build import build_sinks

    bus = Bus(build_sinks(loaded.config.tracking, folder))
    try:
        for note in loaded.notes:
            bus.notice(note)
        require("torch", extra="train", why="training")
        from simpletuner.training.run import train

        train(loaded.config, loaded.datasets, folder, bus)
    finally:
        _tell_failure(sys.exception(), bus)
        bus.close()


def _tell_failure(error: BaseException | None, bus: Bus) -> None:
    if isinstance(error, SimpleTunerError):
        bus.emit(RunFailed(message=error.message, exit_code=error.exit_code))
    elif error is not None:
        bus.emit(RunFailed(message=f"{type(error).__name__}: {error}", exit_code=1))
