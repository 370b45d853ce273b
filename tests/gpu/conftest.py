"""Tests on a CUDA device: `make test-gpu`; the suite itself leaves them out."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    missing = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "tests/gpu/" in item.path.as_posix() and not torch.cuda.is_available():
            item.add_marker(missing)
