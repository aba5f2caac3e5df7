"""The examples in the docstrings run and print what they say; every public name is documented."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import andmask_ext


def modules() -> list[ModuleType]:
    """Return all modules of the package but the command line, and what lacks its framework."""
    names = [
        found.name
        for found in pkgutil.walk_packages(andmask_ext.__path__, "andmask_ext.")
        if not found.name.endswith(("__main__", "._harness", "._cuda_on_host"))
        and (".integrations." not in found.name or importlib.util.find_spec(last(found.name)))
    ]
    return [andmask_ext, *map(importlib.import_module, names)]


def last(name: str) -> str:
    """The framework of a module of integrations has the name of the module."""
    return name.rpartition(".")[2].lstrip("_")


def has_examples(module: ModuleType) -> bool:
    return any(found.examples for found in doctest.DocTestFinder().find(module))


EXAMPLES = list(filter(has_examples, modules()))
PUBLIC = [module for module in modules() if hasattr(module, "__all__")]


@pytest.mark.parametrize("module", EXAMPLES, ids=lambda m: m.__name__)
def test_examples(module: object) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("module", PUBLIC, ids=lambda m: m.__name__)
def test_every_public_name_has_a_docstring(module: object) -> None:
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isroutine(value) or inspect.isclass(value):
            assert inspect.getdoc(value), name
