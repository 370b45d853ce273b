"""``python -m simpletuner`` is the command ``simpletuner``."""

import sys

from simpletuner.apps.cli import main

if __name__ == "__main__":
    sys.exit(main())
