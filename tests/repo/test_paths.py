"""Every path that a page, a comment or a docstring names exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import lru_cache
from itertools import product
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
FOLDERS = (".ci", "andmask_ext", "benchmarks", "cmake", "csrc", "docs", "studies", "tests", "tools")
TOPS = tuple(f"{folder}/" for folder in FOLDERS)
SOURCES = ("py", "h", "cpp", "cu", "md", "toml", "sh")

# What is named and need not be here: patterns, each with the reason.
ALLOWED = {
    "benchmarks/runs*": "written by benchmarks with --save",
    "runs/*": "written by studies and benchmarks",
    "andmask_ext/lib*": "built",
    "andmask_ext/_harness.*": "built",
    "torch/csrc/*": "PyTorch's own",
    "Python.h": "CPython's own",
}

# In prose a path is a name with a folder of this repository in front, or one that ends like a
# source file. In front of it there is no other part of a path, of a variable or of an address.
NAME = r"[\w.*{},-]"
PATH = re.compile(
    rf"(?<![\w/.~$}}*<>-])(?:"
    rf"(?:{'|'.join(map(re.escape, FOLDERS))})/(?:{NAME}|/)*"
    rf"|(?:{NAME}+/)*{NAME}*\w\.(?:{'|'.join(SOURCES)}|\{{[\w,]+\}})(?![\w/(]|\.\w)"
    rf")"
)
PLACEHOLDER = re.compile(r"(^|[/_])x([_.]|$)")  # csrc/math/x.h, tests/test_x.py
ADDRESS = re.compile(r"\w+://\S+|\]\([^)]*\)")  # links have a test of their own
# Strings come first, so that no comment begins inside one.
CPP_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//([^\n]*)|/\*(.*?)\*/', re.DOTALL)
PYTHON_COMMENT = re.compile(
    r'(?s:""".*?"""|\'\'\'.*?\'\'\')|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|#(?P<text>.*)'
)


def files() -> list[str]:
    """Return the paths of the files and folders of the repository."""
    paths = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        paths += [ROOT / folder, *(ROOT / folder).rglob("*")]
    return [p.relative_to(ROOT).as_posix() for p in paths if "__pycache__" not in p.parts]


@lru_cache(None)
def prose(path: Path) -> str:
    """Return what a file says to people: of code, the comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return python_prose(text)
    if path.suffix in (".h", ".cpp", ".cu"):
        return "\n".join(
            (comment[1] or "") + (comment[2] or "") for comment in CPP_COMMENT.finditer(text)
        )
    return text


def python_prose(text: str) -> str:
    comments = [comment["text"] or "" for comment in PYTHON_COMMENT.finditer(text)]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [
        ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse(text))
        if isinstance(node, documented)
    ]
    return "\n".join(comments + docstrings)


def named_paths(text: str) -> Iterator[str]:
    """Yield the paths that a text names, ``x.{h,cpp}`` as two."""
    for path in PATH.finditer(ADDRESS.sub(" ", text)):
        # The end of a sentence or of an enumeration is no part of a name.
        parts = re.split(r"\{([\w,-]+)\}", path[0].rstrip(".,-{"))
        choices = [part.split(",") if odd % 2 else [part] for odd, part in enumerate(parts)]
        yield from ("".join(choice) for choice in product(*choices))


def ends(paths: list[str]) -> set[str]:
    """Return what a path may be called: from one of our folders on in full, else by its end."""
    return {
        end
        for path in paths
        for end in (path, *(path.split("/", count)[-1] for count in range(1, path.count("/") + 1)))
        if end == path or not end.startswith(TOPS)
    }


def exists(name: str, known: set[str]) -> bool:
    if PLACEHOLDER.search(name):
        folder = name.rpartition("/")[0]
        return not folder or exists(folder, known)
    name = name.rstrip("/")
    if name in known or any(fnmatch(name, pattern) for pattern in ALLOWED):
        return True
    return "*" in name and any(fnmatch(end, name) for end in known)


def missing(text: str, known: set[str]) -> list[str]:
    return sorted({name for name in named_paths(text) if not exists(name, known)})


def pages() -> list[Path]:
    """Return the files that are read here."""
    sources = [
        ROOT / name
        for name in files()
        if name.endswith(tuple(f".{end}" for end in SOURCES))
        and not any(fnmatch(name, pattern) for pattern in ALLOWED)
    ]
    return [*sources, ROOT / "Makefile", ROOT / ".ci" / "run"]


def test_every_path_exists() -> None:
    known = ends(files())
    stale = {
        str(page.relative_to(ROOT)): names
        for page in pages()
        if (names := missing(prose(page), known))
    }
    assert stale == {}


def test_many_paths_are_found() -> None:
    """The test above looks at something."""
    counts = {page.name: len(list(named_paths(prose(page)))) for page in pages()}
    assert min(counts["CONTRIBUTING.md"], counts["Makefile"]) > 5
    assert sum(counts.values()) > 100


KNOWN = ["csrc", "csrc/math", "csrc/math/rules.h", "andmask_ext/rules", "setup.py"]


@pytest.mark.parametrize(
    ("text", "stale"),
    [
        ("see `csrc/math/rules.h`, csrc/math/ and math/rules.h.", []),
        ("rules.h, setup.py and andmask_ext/rules", []),
        ("the heads of csrc/math/columns.h", ["csrc/math/columns.h"]),
        ("named by `andmask_ext/rules.py`.", ["andmask_ext/rules.py"]),
        ("lists.h (ops/rules.h)", ["lists.h", "ops/rules.h"]),
        ("csrc/checks", ["csrc/checks"]),
        ("`csrc/math/{rules,columns}.h`", ["csrc/math/columns.h"]),
        ("csrc/math/*.h, csrc/*/rules.h", []),
        ("csrc/math/*.cu", ["csrc/math/*.cu"]),
        ("csrc/math/x.h, csrc/math/x.{h,cpp}, test_x.py", []),
        ("csrc/tasks/x.h", ["csrc/tasks/x.h"]),
        ("https://example.org/csrc/checks.h, [a](csrc/checks.h)", []),
        ("~/csrc/checks.h $ROOT/setup_old.py torch/csrc/stable/tensor.h", []),
        ("rules.html, some.header, 0.5/2.h1", []),
    ],
)
def test_scanner(text: str, stale: list[str]) -> None:
    assert missing(text, ends(KNOWN)) == stale


def test_code_is_not_prose() -> None:
    source = '"""Of a.py."""\nNAME = "b.py"  # in c.py\ndef f():\n    """Of d.py."""\n'
    assert set(named_paths(python_prose(source))) == {"a.py", "c.py", "d.py"}
