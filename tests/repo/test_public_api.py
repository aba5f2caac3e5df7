"""Studies, benchmarks and tools use nothing of the library that a user could not use."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [
    path for folder in ("studies", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")
]
NAMED_TUPLES = {"_asdict", "_replace", "_fields", "_make"}
PRIVATE = re.compile(r"_(?!_)\w+")
PRIVATE_MODULE = re.compile(r"andmask_ext(\.\w+)*\._(?!_)")


def private_uses(source: str, ops: bool = False) -> list[str]:
    """Return what a file uses of andmask_ext's inside.

    Names that the file defines itself are its own. With ``ops``, internal ops may be called by
    their names, to be measured or compiled.
    """
    tree = ast.parse(source)
    own = {node.name for node in ast.walk(tree) if hasattr(node, "name")}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_self(node)
    }
    others = {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if not alias.name.startswith("andmask_ext")
    }
    if ops:  # ops = torch.ops.andmask
        others |= {
            target.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and ast.unparse(node.value) == "torch.ops.andmask"
            for target in node.targets
            if isinstance(target, ast.Name)
        }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if PRIVATE_MODULE.match(alias.name)]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if PRIVATE_MODULE.match(name)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [node.value] if PRIVATE_MODULE.search(node.value) else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and PRIVATE.fullmatch(str(name.value)):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr):
            text = ast.unparse(node)
            allowed = text.partition(".")[0] in others and (
                ops or not text.startswith("torch.ops.andmask.")
            )
            if not (allowed or of_self(node) or node.attr in own | NAMED_TUPLES):
                found.append(text)
    return found


def of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_public_names_are_used(path):
    ops = path.relative_to(ROOT).parts[0] != "studies"
    assert private_uses(path.read_text(), ops) == []


@pytest.mark.parametrize(
    "line",
    [
        "import andmask_ext._norms",
        "import andmask_ext._norms as norms",
        "from andmask_ext import _norms",
        "from andmask_ext.plots._axes import axes_or_new",
        "from andmask_ext.plots.style import _private",
        "importlib.import_module('andmask_ext.optim._base')",
        "optimizer._moments",
        "optimizer.moments[0]._touched[:] = touched",
        "am.Agreement(model, rule)._plan",
        "getattr(optimizer, '_moments')",
        "torch.ops.andmask._resolve(sums)",
    ],
)
def test_a_private_name_is_seen(line):
    assert private_uses(f"import torch\n{line}\n")


@pytest.mark.parametrize(
    "line",
    [
        "from ._private import name",
        "self._moments = []",
        "line._asdict()",
        "torch._foreach_add_(sums, grads)",
        "os._exit(1)",
        "torch.ops.andmask.masked_mean(grads)",
        "model.__class__",
    ],
)
def test_what_is_no_private_name_of_the_library_is_left_alone(line):
    assert not private_uses(f"import os, torch\n{line}\n")


def test_ops_may_be_measured_by_name_where_that_is_said():
    source = "import torch\nops = torch.ops.andmask\n"
    source += "ops._resolve(sums)\ntorch.ops.andmask._aggregate(g)\n"
    assert private_uses(source, ops=True) == []
    assert len(private_uses(source)) == 2


def test_there_is_something_to_look_at():
    assert len(FILES) > 60
