"""The page of number formats says what the table does."""

from __future__ import annotations

import tomllib

import pytest

from simpletuner.apps.docgen import precision_page
from simpletuner.precision.quantisers import QUANTISERS, quantised_in
from tests.architecture.source import ROOT

FORMATS = [name for name in QUANTISERS if name != "no_change"]


def cells(name: str) -> list[str]:
    """The columns of a format's line in the first table."""
    start = f"| `{name}` | {QUANTISERS[name].summary}"
    (line,) = [line for line in precision_page().splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split(" | ")]


@pytest.mark.parametrize("name", FORMATS)
def test_a_line_has_what_the_checks_decide_by(name: str) -> None:
    _, _, size, able, away, dora, lycoris = cells(name)
    assert float(size) == pytest.approx(QUANTISERS[name].fact("weight_bytes"), abs=0.005)
    said = {dtype for dtype in ("fp32", "bf16", "fp16") if quantised_in(name, "cpu", dtype) is None}
    assert set(able.split(", ")) == said
    assert ("Apple" in away) == (quantised_in(name, "mps", "bf16") is not None)
    assert (dora == "yes") == (QUANTISERS[name].fact("dora_in") is None)
    assert (lycoris == "yes") == (QUANTISERS[name].fact("lycoris") is None)


@pytest.mark.parametrize("name", FORMATS)
def test_the_line_that_installs_it_names_an_extra_with_its_package(name: str) -> None:
    needs = QUANTISERS[name].needs
    assert f"| `{name}` | `pip install 'simpletuner[{needs}]'` |" in precision_page()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    package = {"optimum": "optimum-quanto"}.get(
        root := QUANTISERS[name].fact("module").partition(".")[0], root
    )
    packages = project["optional-dependencies"][needs]
    assert any(each.startswith(package) for each in packages)


def test_every_name_that_is_refused_has_a_line() -> None:
    for name, instead in QUANTISERS.elsewhere.items():
        assert f"| `{name}` | `{instead}` |" in precision_page()
