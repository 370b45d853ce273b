from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.apps import docgen
from simpletuner.config.flat import SETTINGS
from simpletuner.data.settings import DatasetSettings, TextEmbedsSettings

DOCUMENTATION = Path(__file__).parents[3] / "documentation"


def test_the_committed_documents_are_current() -> None:
    assert docgen.stale(DOCUMENTATION) == []


def test_every_key_is_documented() -> None:
    documents = docgen.documents()

    for key in SETTINGS:
        assert f"| `{key}` |" in documents["OPTIONS.md"]
    for key in (*DatasetSettings.model_fields, *TextEmbedsSettings.model_fields):
        assert f"| `{key}` |" in documents["DATALOADER.md"]


def test_a_row_says_type_default_range_and_what_is_not_built(tmp_path: Path) -> None:
    page = docgen.documents()["OPTIONS.md"]

    assert "| `lora_rank` | a whole number | `16` |" in page
    assert "(at least 1)" in page
    assert "**Not built yet: fp8.**" in page
    assert "| `optimi-lion` | " in page


def test_writing_makes_them_current_and_a_change_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert docgen.main(["--folder", str(tmp_path)]) == 0
    assert docgen.main(["--folder", str(tmp_path), "--check"]) == 0

    page = tmp_path / "OPTIONS.md"
    page.write_text(page.read_text(encoding="utf-8").replace("# Settings", "# Setings"), "utf-8")

    assert docgen.main(["--folder", str(tmp_path), "--check"]) == 1
    shown = capsys.readouterr().err
    assert "-# Setings" in shown
    assert "run `make docs`" in shown
