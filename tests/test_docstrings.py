"""The examples in the docstrings run and print what they say; every public name is documented."""

from __future__ import annotations

import doctest
import inspect

import pytest

import andmask_ext
from andmask_ext import _backward, _library, agreement, moments, nn, ops, optim, reference, rules
from andmask_ext.agreement import _agreement
from andmask_ext.nn import _batchnorm
from andmask_ext.optim import adam, sgd, temporal, wrapper
from andmask_ext.optim import reference as optim_reference

pytestmark = pytest.mark.cpu_only

EXAMPLES = [
    _agreement,
    _backward,
    _batchnorm,
    _library,
    adam,
    moments,
    ops,
    rules,
    sgd,
    temporal,
    wrapper,
]
PUBLIC = [andmask_ext, agreement, moments, nn, ops, optim, optim_reference, reference, rules]


@pytest.mark.parametrize("module", EXAMPLES, ids=lambda m: m.__name__)
def test_examples(module: object) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("module", PUBLIC, ids=lambda m: m.__name__)
def test_every_public_name_has_a_docstring(module: object) -> None:
    for name in module.__all__:
        value = getattr(module, name)
        if callable(value):
            assert inspect.getdoc(value), name
