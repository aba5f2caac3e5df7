"""The house rules that a program can check: no file too long to read, and imports flow one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "andmask_ext"

# ---- files ----

LONGEST = 400
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".md"}
FOLDERS = ["andmask_ext", "benchmarks", "cmake", "csrc", "docs", "studies", "tests", "tools"]
GENERATED = "docs/results/"  # most of it, by tools/results.py
# To be split. An entry whose file has become short fails the test, too.
TOO_LONG = {
    "benchmarks/README.md",
    "docs/theory.md",
}


def files() -> Iterator[Path]:
    yield from (path for path in ROOT.iterdir() if path.suffix in SUFFIXES)
    for folder in FOLDERS:
        yield from (path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)


def test_no_file_is_too_long_to_read() -> None:
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in files()
    }
    long = {
        name for name, count in lines.items() if count > LONGEST and not name.startswith(GENERATED)
    }
    assert long == TOO_LONG


# ---- imports ----

# What is on the right may import what is on the left. Modules that are not named serve all.
FLOW = [
    {"ops", "_memory"}, {"moments"}, {"rules"}, {"_pending"}, {"_backward", "optim"},
    {"agreement"}, {"metrics", "nn"}, {"plots"}, {"integrations"},
]  # fmt: skip

Graph = dict[str, set[str]]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(text: str, path: Path, modules: set[str]) -> set[str]:
    """Return the modules that a file's imports name, those under TYPE_CHECKING included."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path.parent)
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            whole = {f"{base}.{alias.name}" for alias in node.names}
            imported |= whole & modules
            imported |= {base} if whole - modules else set()
    return (imported & modules) - {module_name(path)}


def import_graph() -> Graph:
    paths = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    return {
        name: imports_of(path.read_text(encoding="utf-8"), path, set(paths))
        for name, path in paths.items()
    }


def reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for name in graph[waiting.pop()] - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_imports_flow_one_way() -> None:
    graph = import_graph()
    floors = {name: floor for floor, names in enumerate(FLOW) for name in names}
    assert set(floors) <= set(map(room, graph)), "FLOW names a module that does not exist"
    upwards = {
        (room(start), room(end))
        for start in graph
        for end in reachable(graph, start)
        if room(start) in floors and room(end) in floors
        if floors[room(start)] < floors[room(end)]
    }
    assert upwards == set()


def test_no_module_imports_itself_through_others() -> None:
    graph = import_graph()
    below = {name: reachable(graph, name) for name in graph}
    cycles = {
        frozenset(other.partition(".")[2] for other in below[name] if name in below[other])
        for name in graph
        if name in below[name]
    }
    assert cycles == set()


def test_an_import_of_any_form_is_seen(tmp_path: Path) -> None:
    path = PACKAGE / "optim" / "_new.py"
    known = {"andmask_ext.ops", "andmask_ext.optim._base", "andmask_ext.moments", "andmask_ext"}
    text = """
import andmask_ext.ops, torch
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from ..moments import Moments
def late():
    from . import _base
    from .. import Agreement
"""
    assert imports_of(text, path, known) == known
