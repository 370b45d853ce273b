"""Every setting is read, every row is built and tested, and what is generated is current."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
import typing
from collections.abc import Iterator

import pytest
from pydantic.fields import FieldInfo

from simpletuner.config.load import load
from simpletuner.config.root import Config
from simpletuner.core.section import Section, hint_of, inner_section
from simpletuner.core.table import Table
from simpletuner.data.settings import DatasetSettings, TextEmbedsSettings
from tests.architecture.source import ROOT, Module, modules

EXAMPLES = sorted(path.parent.name for path in ROOT.glob("config/examples/*/config.json"))
READS_BY_KEY = (
    "simpletuner.config.datasets",
    "simpletuner.config.load",
    "simpletuner.models.families",
    "simpletuner.models.family",
)
PLUG_IN_FOLDERS = ("models/families", "data/storage", "tracking/sinks")


def test_every_setting_that_offers_a_choice_is_read_by_some_component() -> None:
    read = {name for module in modules() for name in _reads(module)}
    unread = [
        f"{section.__name__}.{name}"
        for section, name, field in _fields()
        if name not in read and not _waits(field)
    ]

    assert not unread, "\n".join(unread)


def test_every_setting_has_a_sentence_of_help() -> None:
    silent = [f"{section.__name__}.{name}" for section, name, f in _fields() if not f.description]

    assert not silent


def test_every_built_row_names_something_that_imports() -> None:
    for table, _ in _tables():
        for row in table.values():
            assert row.summary, f"{table.title} {row.name} has no summary"
            if not row.pending:
                assert callable(row.load())


def test_every_row_names_an_extra_that_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    needed = {row.needs for table, _ in _tables() for row in table.values() if row.needs}

    assert needed <= set(project["optional-dependencies"])


def test_every_built_row_and_every_plug_in_file_has_a_test() -> None:
    tests = [p for p in (ROOT / "tests").rglob("test_*.py") if p.parent.name != "architecture"]
    words = set(re.findall(r"[\w-]+", "\n".join(p.read_text(encoding="utf-8") for p in tests)))
    rows = [
        row.name
        for table, name in _tables()
        if name not in words  # a test over the whole table covers all its rows
        for row in table.values()
        if not row.pending
    ]
    files = [
        path.stem
        for folder in PLUG_IN_FOLDERS
        for path in (ROOT / "simpletuner" / folder).glob("[!_]*.py")
        if path.stem != "base"
    ]

    assert [name for name in (*rows, *files) if name not in words] == []


def test_the_generated_documents_are_current() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "simpletuner.apps.docgen", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_shipped_example_passes_its_check_and_asks_for_nothing_that_is_not_built(
    name: str,
) -> None:
    loaded = load(["--example", name], {}, ROOT)

    assert loaded.pending == ()


def _reads(module: Module) -> Iterator[str]:
    """The attributes a module reads, and the keys `config` and a family take by name.

    A section's own checks are no readers of it, its other methods are.
    """
    if module.layer.startswith("apps"):
        return
    own_checks = [
        node
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef)
        if any("validator" in ast.unparse(mark) for mark in node.decorator_list)
    ]
    skipped = {id(node) for check in own_checks for node in ast.walk(check)}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if id(node) not in skipped:
                yield node.attr
        elif isinstance(node, ast.Constant) and module.name.startswith(READS_BY_KEY):
            yield str(node.value)


def _waits(field: FieldInfo) -> bool:
    """True if nothing but the field's default can be used, so that there is nothing to read."""
    pending = hint_of(field).pending
    if pending is True:
        return True
    choices = set(_choices(field.annotation))
    return bool(choices) and len(choices - set(pending or ())) <= 1


def _choices(annotation: object) -> Iterator[object]:
    """The values that the literals in a type allow."""
    if typing.get_origin(annotation) is typing.Literal:
        yield from typing.get_args(annotation)
    else:
        for inner in typing.get_args(annotation):
            yield from _choices(inner)


def _fields() -> Iterator[tuple[type[Section], str, FieldInfo]]:
    """Every setting: of the root's sections, and of the entries of multidatabackend.json."""
    types = typing.get_type_hints(Config)
    sections = [types[name] for name in Config.model_fields]
    for section in (*sections, DatasetSettings, TextEmbedsSettings):
        yield from _fields_of(section)


def _fields_of(section: type[Section]) -> Iterator[tuple[type[Section], str, FieldInfo]]:
    """The settings of one section, and of the sections that some of them take."""
    for name, field in section.model_fields.items():
        yield section, name, field
        if inner := inner_section(field):
            yield from _fields_of(inner)


def _tables() -> list[tuple[Table, str]]:
    """Every table of the package, with its dotted name."""
    found = []
    for module in modules():
        for statement in module.tree.body:
            if not isinstance(statement, (ast.Assign, ast.AnnAssign)) or statement.value is None:
                continue
            value = statement.value
            if isinstance(value, ast.Call) and ast.unparse(value.func) == "Table":
                target = statement.targets[0] if isinstance(statement, ast.Assign) else None
                name = ast.unparse(target or statement.target)  # type: ignore[union-attr]
                found.append((getattr(importlib.import_module(module.name), name), name))
    return found
