"""Who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys

from tests.architecture.source import PACKAGE, ROOT, Module, modules

LEAVES = ("diffusion", "models", "optim", "precision", "runtime", "tracking", "publish", "data")
BELOW_VALIDATION = ("adapters", "cache", "data", "diffusion", "models")
BELOW_CONFIG = (*LEAVES, "adapters", "cache", "validation")
MAY_IMPORT = {
    "core": (),
    **dict.fromkeys(LEAVES, ("core",)),
    "adapters": ("core", "models"),
    "cache": ("core", "data", "models"),
    "validation": ("core", *BELOW_VALIDATION),
    "config": ("core", *BELOW_CONFIG),
    "training": ("core", *BELOW_CONFIG, "config"),
    "apps": ("core", *BELOW_CONFIG, "config", "training"),
}
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate")


def test_a_layer_imports_only_layers_below_it() -> None:
    wrong = [
        f"{module.name} imports {target}"
        for module in modules()
        for target in module.imports
        if not _allowed(module, target)
    ]

    assert not wrong, "\n".join(wrong)


def test_every_package_has_its_init_file_and_belongs_to_a_layer() -> None:
    folders = {module.path.parent for module in modules()}
    tops = {folder.name for folder in folders if folder.parent == ROOT / PACKAGE}

    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
    assert tops <= set(MAY_IMPORT)


def test_there_is_no_import_cycle_even_through_late_imports() -> None:
    cycles = _cycles({module.name: module.runs for module in modules()})

    assert not cycles, "\n".join(" -> ".join(cycle) for cycle in cycles)


def test_tables_and_plug_in_folders_know_no_settings() -> None:
    wrong = [
        f"{module.name} imports {target}"
        for module in modules()
        if module.name.count(".") > 2 or _defines_a_table(module)
        for target in module.runs
        if target.endswith(".settings") and module.layer not in ("config", "training")
        if not module.layer.startswith("apps")
    ]

    assert not wrong, "\n".join(wrong)


def test_no_relative_import_is_used() -> None:
    wrong = [
        module.at(node)
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]

    assert not wrong


def test_the_front_half_starts_without_torch() -> None:
    front = [m.name for m in modules() if m.layer in ("apps.cli", "config")]
    front += [m.name for m in modules() if m.name.endswith(".settings")]
    script = (
        f"import sys\nfor name in {front!r}: __import__(name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def _allowed(module: Module, target: str) -> bool:
    theirs = target.split(".")[1:]
    if not theirs:  # `simpletuner` itself: the version
        return True
    if module.layer in ("", "__main__"):
        return theirs[:2] == ["apps", "cli"]
    ours = module.layer.split(".")
    if theirs[0] != ours[0]:
        return theirs[0] in MAY_IMPORT.get(ours[0], ())
    if ours[0] == "apps":
        return ours == theirs[:2] or ours[1] == "cli"
    return True


def _defines_a_table(module: Module) -> bool:
    return any(
        isinstance(node, ast.Call) and ast.unparse(node.func) == "Table"
        for statement in module.tree.body
        if isinstance(statement, (ast.Assign, ast.AnnAssign))
        for node in ast.walk(statement)
    )


def _cycles(edges: dict[str, frozenset[str]]) -> list[list[str]]:
    """One cycle for each module that can reach itself, each set of modules once."""
    found: dict[frozenset[str], list[str]] = {}
    for start in edges:
        paths, seen = [[start]], {start}
        while paths:
            path = paths.pop(0)
            for target in sorted(edges[path[-1]]):
                if target == start:
                    found.setdefault(frozenset(path), [*path, start])
                elif target not in seen:
                    seen.add(target)
                    paths.append([*path, target])
    return list(found.values())
