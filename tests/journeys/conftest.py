from __future__ import annotations

from pathlib import Path

import pytest

from tests.ways import Bench


@pytest.fixture(scope="module")
def bench(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("ways"), tiny_sdxl)
