"""The quickstart pages work as printed: their settings pass `check`, their commands exist."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from itertools import dropwhile, groupby
from pathlib import Path
from typing import Any

import pytest

from simpletuner.apps.cli import COMMANDS, main
from simpletuner.config.find import examples_folder
from tests.runs import make_pictures

PAGES = sorted((Path(__file__).parents[3] / "documentation/quickstart").glob("*.md"))
ASSIGNMENT = re.compile(r"\w+=")
OWN = {"data_backend_config", "output_dir", "validation_prompt", "id", "instance_data_dir"}
"""Where a page may differ from the shipped example: what belongs to the user, and its place."""


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def json_blocks(page: Path) -> tuple[list[str], list[list[dict[str, Any]]]]:
    """The settings files that a page prints, as they stand, and its dataset files."""
    found = {block: json.loads(block) for block in blocks(page, "json")}
    files = [block for block, value in found.items() if "model_family" in value]
    return files, [value for value in found.values() if isinstance(value, list)]


def commands(script: str) -> Iterator[list[str]]:
    """The simple commands of a shell script, without comments and assignments before them."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        words.whitespace_split = True
        for between, group in groupby(words, key=lambda word: word in ("&&", "||", "|", ";")):
            words_of_one = list(dropwhile(ASSIGNMENT.match, group))
            if words_of_one and not between:
                yield words_of_one


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_printed_pair_of_files_passes_and_asks_for_nothing_unbuilt(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ENV", "CONFIG_BACKEND", "CONFIG_PATH", "TRAINER_EXTRA_ARGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    pictures = make_pictures(tmp_path / "pictures", 2)
    configs, datasets = json_blocks(page)
    assert configs
    assert datasets

    for config in configs:
        for entries in datasets:
            for entry in entries:
                if "instance_data_dir" in entry:
                    entry["instance_data_dir"] = str(pictures)
            (tmp_path / "config.json").write_text(config, "utf-8")
            (tmp_path / "multidatabackend.json").write_text(json.dumps(entries), "utf-8")
            code = main(["check", "--json", "--config", "config.json"])
            facts = json.loads(capsys.readouterr().out)
            assert code == 0, facts["problems"]
            assert (facts["pending"], facts["notes"]) == ([], [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_simpletuner_command_exists(page: Path) -> None:
    found = [words for block in blocks(page, "bash") for words in commands(block)]
    ours = [words for words in found if words[0] == "simpletuner"]

    assert ours
    for words in ours:
        assert words[1:2], words
        assert words[1] in COMMANDS, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_python_block_parses(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_prints_the_values_of_the_shipped_example(page: Path) -> None:
    folder = examples_folder() / f"{page.stem.lower()}-lora"
    (config,), (datasets,) = json_blocks(page)
    shipped = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    entries = json.loads((folder / "multidatabackend.json").read_text(encoding="utf-8"))

    for printed, example in zip([json.loads(config), *datasets], [shipped, *entries], strict=True):
        assert {key: value for key, value in printed.items() if key not in OWN} == {
            key: value for key, value in example.items() if key not in OWN
        }


def test_commands_are_read_from_a_shell_script() -> None:
    script = "ENV=a simpletuner train \\\n  --b # c\n. x && simpletuner check; y\n"

    assert list(commands(script)) == [
        ["simpletuner", "train", "--b"],
        [".", "x"],
        ["simpletuner", "check"],
        ["y"],
    ]
