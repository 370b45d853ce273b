"""The package as the rules see it: its modules, parsed, and what imports what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "simpletuner"


@dataclass(frozen=True)
class Module:
    """One file of the package.

    Args:
        name: Dotted; a package's own name for its ``__init__.py``.
        imports: Our modules it imports, also inside functions and for type checking.
        runs: The same without those for type checking: what can take part in a cycle.
    """

    name: str
    path: Path
    tree: ast.Module
    imports: frozenset[str]
    runs: frozenset[str]

    @property
    def layer(self) -> str:
        """``core``, ``data`` …; ``apps.cli`` and the like for an app."""
        parts = self.name.split(".")[1:]
        return ".".join(parts[:2]) if parts[:1] == ["apps"] else ".".join(parts[:1])

    def at(self, node: ast.AST) -> str:
        """``path:line`` of a node, as the editor opens it."""
        return f"{self.path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


@cache
def modules() -> tuple[Module, ...]:
    """Every module of the package, by name."""
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    names = {_name(path): path for path in paths}
    return tuple(_module(name, path, frozenset(names)) for name, path in names.items())


def python_files() -> list[Path]:
    """Every Python file of the repository that people write."""
    folders = (PACKAGE, "tests", "scripts", "benchmarks")
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module(name: str, path: Path, names: frozenset[str]) -> Module:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    found = [(node, target) for node in ast.walk(tree) for target in _targets(node, names)]
    others = [(node, target) for node, target in found if target != name]
    return Module(
        name=name,
        path=path,
        tree=tree,
        imports=frozenset(target for _, target in others),
        runs=frozenset(target for node, target in others if id(node) not in typing_only),
    )


def _targets(node: ast.AST, names: frozenset[str]) -> Iterator[str]:
    """Our modules that an import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            target = inner if inner in names else node.module
            if target in names:
                yield target
