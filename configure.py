"""Writes a configuration by asking: `python configure.py` is `simpletuner configure`."""

import sys

from simpletuner.apps.cli import main

if __name__ == "__main__":
    sys.exit(main(["configure", *sys.argv[1:]]))
