from __future__ import annotations

import os

import pytest

from tests.faults.forks import Forks
from tests.faults.small import FAMILIES, Small

# What is written and how does not depend on the family: one of them shows it, all of them if asked.
CHOSEN = FAMILIES if "EVERY_POINT" in os.environ else FAMILIES[:1]


@pytest.fixture(scope="session", params=CHOSEN, ids=[name for name, _ in CHOSEN])
def small(
    request: pytest.FixtureRequest, forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> Small:
    family, model = request.param
    root = tmp_path_factory.mktemp(f"faults-{family}")
    return Small(forks, root, family, request.getfixturevalue(model))
