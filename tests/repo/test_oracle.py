"""The oracle stays an oracle: the package computes nothing with it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import andmask_ext
from andmask_ext import reference
from andmask_ext.rules._threshold import vote_threshold

PACKAGE = Path(andmask_ext.__file__).parent


def modules_of(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names of all that is imported, without leading dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def imports_oracle(source: str) -> bool:
    return any("reference" in name.split(".") for name in modules_of(ast.parse(source)))


def test_no_module_of_the_package_imports_the_oracle() -> None:
    paths = sorted(PACKAGE.rglob("*.py"))
    product = [path for path in paths if path.name != "reference.py"]
    assert len(paths) - len(product) == 2  # of the ops, of the optimizers
    assert len(product) > 50
    users = [str(path.relative_to(PACKAGE)) for path in product if imports_oracle(path.read_text())]
    assert users == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from .. import reference", True),
        ("from ..reference import vote_threshold", True),
        ("from andmask_ext.optim import reference as oracle", True),
        ("def f():\n    import andmask_ext.reference", True),
        ("from .rules import AndMask  # see reference", False),
    ],
)
def test_imports_are_found(source: str, expected: bool) -> None:
    assert imports_oracle(source) is expected


@given(tau=st.floats(0, 1), environments=st.integers(1, 40_000))
def test_threshold_of_the_product_is_that_of_the_oracle(tau: float, environments: int) -> None:
    assert vote_threshold(tau, environments) == reference.vote_threshold(tau, environments)


@given(votes=st.integers(0, 40_000), others=st.integers(0, 40_000))
def test_threshold_of_a_tie_is_exact(votes: int, others: int) -> None:
    environments = max(1, votes + others)
    assert vote_threshold(votes / environments, environments) == votes
