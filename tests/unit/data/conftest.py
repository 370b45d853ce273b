from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.data.making import picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    for name, size in (
        ("a_cat.png", (96, 64)),
        ("dog.png", (64, 96)),
        ("deep/er/ox.png", (64, 64)),
    ):
        picture(data, name, size)
    return data
