"""What all tests share: the threads and offline switches torch reads at import, and tiny models."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.faults.forks import Forks

# Read once, when torch and the tokenizers are imported. Two OpenMP threads that wait for each other
# on a busy machine make the suite ten times slower.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What the suite proves to the bit, it proves of the CPU; tests/gpu is run by `make test-gpu`.
if "SIMPLETUNER_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL folder that predicts noise; shared by all tests, so read it only."""
    from tests.tiny.build import build_sdxl

    return build_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3 folder; shared by all tests, so read it only."""
    from tests.tiny.build import build_sd3

    return build_sd3(tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture(scope="session")
def tiny_sd1x(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1 folder that predicts noise; shared, so read it only."""
    from tests.tiny.build import build_sd1x

    return build_sd1x(tmp_path_factory.mktemp("tiny") / "sd1x")


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX.1 folder that is told a guidance strength; shared, so read it only."""
    from tests.tiny.build import build_flux

    return build_flux(tmp_path_factory.mktemp("tiny") / "flux")


@pytest.fixture(scope="session")
def tiny_sdxl_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL folder that predicts v; shared by all tests, so read it only."""
    from tests.tiny.build import build_sdxl

    return build_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl-v", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Runs in forks of one process that has imported everything."""
    if not sys.platform.startswith("linux"):
        pytest.skip("forks with torch loaded, and /proc, are Linux's")
    from tests.faults.forks import Forks

    with Forks(tmp_path_factory.mktemp("forks")) as started:
        yield started
