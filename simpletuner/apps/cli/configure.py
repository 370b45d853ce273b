"""``simpletuner configure``: the settings files to start from, written beside nothing of yours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simpletuner.config.find import shipped_folder
from simpletuner.core.errors import ConfigError
from simpletuner.core.files import write_bytes

HELP = """\
usage: simpletuner configure

Writes config/config.json, config/multidatabackend.json, config/user_prompt_library.json and
config/webhooks.json where they do not exist yet, from the examples that the product ships, and says
which settings come next. Never changes a file that is there.
"""

_NEXT = """\
set these next:
  config/config.json            model_family, output_dir, validation_prompt
  config/multidatabackend.json  instance_data_dir (your pictures), caption_strategy
then:
  simpletuner check
  simpletuner train"""


def run(arguments: Sequence[str]) -> int:
    """Write the files that are not there yet into ``config/``."""
    if {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return 0
    if arguments:
        raise ConfigError(f"`simpletuner configure` takes no {arguments[0]!r}", fix=HELP.rstrip())
    examples = sorted(shipped_folder().glob("*.example"))
    if not examples:
        raise ConfigError(f"this installation has no example files in {shipped_folder()}")
    for example in examples:
        print(_copy(example, Path("config", example.stem)))
    print(_NEXT)
    return 0


def _copy(example: Path, target: Path) -> str:
    """Write `example` to `target`, unless something is there; what was done."""
    if target.exists():
        return f"kept   {target}"
    write_bytes(target, example.read_bytes())
    return f"wrote  {target}"
