from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.config.workplace import Workplace


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    """A working directory with a valid configuration of one dataset."""
    workplace = Workplace(tmp_path)
    workplace.config()
    workplace.datasets()
    return workplace
