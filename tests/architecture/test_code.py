"""What may not stand in the code."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from simpletuner.models.families import FAMILIES
from tests.architecture.source import ROOT, Module, modules, python_files

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
DOORS = {  # where an exception of any kind may be caught, and why
    "simpletuner.apps.cli": "the command line",
    "simpletuner.core.events": "a sink's worker",
    "simpletuner.publish.hub": "the upload worker",
    "simpletuner.validation.validator": "the validation duty",
}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle", "joblib"}
MUTATORS = {
    *("add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft"),
    *("remove", "reverse", "setdefault", "sort", "update", "appendleft", "subtract"),
}
CONTAINERS = {"dict", "list", "set", "defaultdict", "deque", "Counter", "OrderedDict", "bytearray"}

Node = tuple[Module, ast.AST]


def nodes() -> Iterator[Node]:
    for module in modules():
        for node in ast.walk(module.tree):
            yield module, node


def named(found: list[Node]) -> str:
    return "\n".join(f"{module.at(node)}  {ast.unparse(node)[:80]}" for module, node in found)


def test_no_file_passes_the_wall() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in python_files()
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MAX_FILE_LINES
    }

    assert long == {}


def test_no_function_is_longer_than_a_screen() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": count
        for path in python_files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if (count := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    }

    assert long == {}


def test_only_the_family_files_ask_which_family_it_is() -> None:
    found = [
        (module, node)
        for module, node in nodes()
        if not module.name.startswith("simpletuner.models.families")
        if isinstance(node, (ast.Compare, ast.Match)) and _asks_for_a_family(node)
    ]

    assert not found, named(found)


def test_exceptions_of_any_kind_are_caught_at_the_four_doors_only() -> None:
    found = [
        (module, node)
        for module, node in nodes()
        if isinstance(node, ast.ExceptHandler) and _catches_all(node)
    ]
    doors = [module.name for module, _ in found]

    assert not [pair for pair in found if pair[0].name not in DOORS], named(found)
    assert len(doors) == len(set(doors)), named(found)


def test_there_is_no_global_statement() -> None:
    found = [(module, node) for module, node in nodes() if isinstance(node, ast.Global)]

    assert not found, named(found)


def test_no_module_holds_state() -> None:
    found = []
    for module in modules():
        names = _containers(module)
        found += [(module, node) for name, node in names.items() if name.upper() != name]
        found += [(module, node) for node in ast.walk(module.tree) if _mutates(node, names)]

    assert not found, named(found)


def test_no_unsafe_call_is_made() -> None:
    found = [(module, node) for module, node in nodes() if _is_unsafe(node)]

    assert not found, named(found)


def test_randomness_comes_from_seeds_only() -> None:
    found = [
        (module, node)
        for module, node in nodes()
        if _imports(node, {"random"})
        or (isinstance(node, ast.Attribute) and ast.unparse(node) in ("np.random", "numpy.random"))
    ]

    assert not found, named(found)


def _asks_for_a_family(node: ast.Compare | ast.Match) -> bool:
    if isinstance(node, ast.Match):
        asked: list[ast.AST] = [node.subject, *(case.pattern for case in node.cases)]
    else:
        asked = [node.left, *node.comparators]
    constants = {
        inner.value
        for part in asked
        for inner in ast.walk(part)
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str)
    }
    return bool(constants & set(FAMILIES)) or (
        bool(constants) and any("model_family" in ast.unparse(part) for part in asked)
    )


def _catches_all(node: ast.ExceptHandler) -> bool:
    caught = {"BaseException"} if node.type is None else set(_names(node.type))
    passes_on = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
    return "Exception" in caught or ("BaseException" in caught and not passes_on)


def _names(node: ast.AST) -> Iterator[str]:
    return (inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name))


def _containers(module: Module) -> dict[str, ast.AST]:
    """The names a module binds to something that can change, and where."""
    found: dict[str, ast.AST] = {}
    for statement in module.tree.body:
        if isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets, value = [statement.target], statement.value
        else:
            continue
        displays = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
        made = isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in CONTAINERS
        if isinstance(value, displays) or made:
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            found |= {name: statement for name in names if name != "__all__"}
    return found


def _mutates(node: ast.AST, names: dict[str, ast.AST]) -> bool:
    """True if a node changes the container that one of `names` is bound to."""
    match node:
        case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
            return name in names
        case ast.AugAssign(target=ast.Name(id=name)):
            return name in names
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)):
            return name in names and method in MUTATORS
        case _:
            return False


def _imports(node: ast.AST, names: set[str]) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] in names for alias in node.names)
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in names


def _is_unsafe(node: ast.AST) -> bool:
    if _imports(node, UNSAFE_MODULES):
        return True
    if isinstance(node, ast.Attribute):
        return ast.unparse(node) in ("torch.load", "os.system")
    if isinstance(node, ast.Constant):
        return node.value == "trust_remote_code"
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
        return True
    off = {word.arg for word in node.keywords if not _is_false(word.value)}
    return bool(off & {"allow_pickle", "shell", "trust_remote_code"})


def _is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_no_device_is_written_into_the_code() -> None:
    """Where tensors go is `Place`'s business; asking what kind of device it is, is allowed."""
    hard = [
        f"{module.name}:{node.lineno}"
        for module, node in nodes()
        if isinstance(node, ast.Call) and _names_an_accelerator(node)
    ]

    assert not hard


def _names_an_accelerator(call: ast.Call) -> bool:
    function = ast.unparse(call.func)
    if function.endswith((".cuda", ".mps", ".xpu")) and function.split(".")[0] != "torch":
        return True
    words = [*call.args, *(word.value for word in call.keywords)]
    named = [w.value for w in words if isinstance(w, ast.Constant) and isinstance(w.value, str)]
    return any(name.split(":")[0] in ("cuda", "mps", "xpu") for name in named)
