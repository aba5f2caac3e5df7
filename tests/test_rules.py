"""The rule objects."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import andmask_ext as am


def test_calls_the_operator() -> None:
    grads = torch.randn(5, 3, 4)
    for tau, rescale in [(1.0, False), (0.6, True), (0.0, False)]:
        expected = torch.ops.andmask.masked_mean(grads, tau, rescale)
        assert torch.equal(am.AndMask(tau, rescale)(grads), expected)


def test_is_an_immutable_value() -> None:
    rule = am.AndMask(tau=0.8, rescale=True)
    assert repr(rule) == "AndMask(tau=0.8, rescale=True)"
    assert rule == am.AndMask(0.8, True) != am.AndMask(0.8)
    assert len({rule, am.AndMask(0.8, True)}) == 1
    assert pickle.loads(pickle.dumps(rule)) == copy.deepcopy(rule) == rule
    with pytest.raises(AttributeError):
        rule.tau = 0.5


def test_tau_may_be_an_int_or_a_float64_scalar() -> None:
    assert am.AndMask(1) == am.AndMask(np.float64(1.0)) == am.AndMask(1.0)
    assert type(am.AndMask(np.float64(0.5)).tau) is float


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((1.1,), ValueError, r"tau: expected a number in \[0, 1\], but got 1.1"),
        ((float("nan"),), ValueError, "tau: .* but got nan"),
        (("1",), TypeError, "tau: .* but got str"),
        ((np.float32(0.8),), TypeError, "tau: .* Python number .* but got float32"),
        ((1.0, "yes"), TypeError, "rescale: expected a bool, but got str"),
    ],
)
def test_arguments_are_checked(
    args: tuple[object, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        am.AndMask(*args)


def test_grads_are_checked() -> None:
    with pytest.raises(TypeError, match="grads: expected a Tensor"):
        am.AndMask()([1.0])
