"""The order of the house: imports go one way, and every room stays small."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "dpjax"
# A module may import from its own level's package and from those before it.
ORDER = [
    ["errors"],
    ["types"],
    ["data"],
    ["models"],
    ["clipping"],
    ["noise"],
    ["discrete_noise"],
    ["strategies"],
    ["correlated_noise"],
    ["sampling"],
    ["accounting"],
    ["discrete_accounting"],
    ["trade_off"],
    ["adaptive"],
    ["releases"],
    ["mechanism"],
    ["optimizers"],
    ["ledger"],
    ["training"],
    ["checkpoint"],
    ["artifact"],
    ["federated"],
    ["generation"],
    ["private_prediction"],
    ["evaluation"],
    ["quality"],
    ["auditing"],
    ["report"],
    ["runs"],
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
FLAT = ("clipping", "noise", "discrete_noise", "adaptive", "sampling", "accounting")
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "dpjax" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_up_the_list(path):
    if path == PACKAGE / "__init__.py":
        return
    own = room(path)
    assert own in LEVEL, f"{own} has no place in the order: add it where it belongs"
    for other in imported_rooms(path):
        assert LEVEL[other] <= LEVEL[own], f"{path.name} imports {other}, which comes after {own}"
        if own in FLAT and other in FLAT:
            assert own == other, f"{own} imports {other}: only mechanism and optimizers join them"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
    assert path.name != "utils.py"


def test_no_key_is_made_up_in_the_library():
    """`jax.random.key(...)` belongs to callers; the library makes one from an explicit seed."""
    makers = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = ast.unparse(node.func)
                if name in ("jax.random.key", "jax.random.PRNGKey", "random.key"):
                    constant = bool(node.args) and isinstance(node.args[0], ast.Constant)
                    makers.append((path.name, ast.unparse(node), constant))
    assert not [m for m in makers if m[2]], makers
    assert {m[0] for m in makers} <= {"config.py"}, makers


def test_public_functions_say_what_they_do():
    bare = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                overload = any(ast.unparse(d) == "overload" for d in node.decorator_list)
                if ast.get_docstring(node) is None and not overload:
                    bare.append(f"{path.name}:{node.name}")
    assert not bare
