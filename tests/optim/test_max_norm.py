"""``max_norm`` clips between rule and update, as clip_grad_norm_ does, and writes nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

import andmask_ext as am

from ..rules.rule_table import TABLE, examples
from .common import (
    MAKERS,
    assert_equal,
    environments,
    optim,
    parameters,
    random_grads,
    values,
)

makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
norms = pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6])
RULES = [rule for rule in examples() if TABLE[type(rule)].streamable]
INF = float("inf")


def pair(make: Any, max_norm: float, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Two equal sets of parameters: an optimizer that clips, and one that does not."""
    params = parameters(dtype)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    return params, make(params, max_norm=max_norm, **options), others, make(others, **options)


def step_by_hand(optimizer: Any, params: Sequence[Tensor], max_norm: float) -> Tensor:
    """What ``max_norm`` stands for: write the gradients, clip them, step along them."""
    optimizer.write_grads()
    norm = clip_grad_norm_(params, max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def assert_close(one: Sequence[Tensor], other: Sequence[Tensor], tolerance: float) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(
            a.detach(), b.detach(), rtol=tolerance, atol=tolerance, equal_nan=True
        )


def assert_norm(optimizer: Any, expected: Tensor | float, tolerance: float = 1e-9) -> None:
    found = optimizer.grad_norm
    assert found.shape == ()
    assert found.dtype == torch.float64
    torch.testing.assert_close(
        found, torch.as_tensor(expected).double(), rtol=tolerance, atol=0, equal_nan=True
    )


# ---- the same as by hand ----


@makers
@norms
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_equals_clip_grad_norm(make: Any, max_norm: float, rule: am.rules.Rule) -> None:
    params, optimizer, others, plain = pair(make, max_norm, rule=rule)
    for _ in range(3):
        grads = random_grads(params)
        environments(optimizer, params, grads)
        environments(plain, others, grads)
        optimizer.step()
        assert_norm(optimizer, step_by_hand(plain, others, max_norm))
        assert_close(params, others, 1e-9)
        optimizer.zero_grad()


@makers
@norms
def test_the_norm_is_over_all_groups(make: Any, max_norm: float) -> None:
    """Groups with rules of their own, one of which no environment reaches."""

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        rules = (am.AndMask(0.6, rescale=True), am.rules.Mean(), am.rules.GeometricMean(0.3))
        chosen = [{"params": [p], "rule": r} for p, r in zip(params, rules, strict=True)]
        return [*chosen, {"params": [nn.Parameter(torch.ones(3).double())]}]

    params = parameters(torch.float64)
    others = copy.deepcopy(params)
    optimizer, plain = make(groups(params), max_norm=max_norm), make(groups(others))
    for _ in range(3):
        grads = random_grads(params)
        environments(optimizer, params, grads)
        environments(plain, others, grads)
        optimizer.step()
        assert_norm(optimizer, step_by_hand(plain, others, max_norm))
        assert_close(params, others, 1e-9)
        optimizer.zero_grad()


@makers
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.003)],
)
@pytest.mark.parametrize("max_norm", [0.1, 1e3])
def test_dtypes(make: Any, dtype: torch.dtype, tolerance: float, max_norm: float) -> None:
    """By hand gradients are rounded to 16 bits; here they are not."""
    params, optimizer, others, plain = pair(make, max_norm, dtype, tau=0.0)
    grads = random_grads(params)
    environments(optimizer, params, grads)
    environments(plain, others, grads)
    optimizer.step()
    assert_norm(optimizer, step_by_hand(plain, others, max_norm), tolerance)
    assert_close(params, others, tolerance)


@settings(max_examples=40)
@given(data=st.data())
def test_tau_0_is_torch(data: st.DataObject) -> None:
    """tests/optim/test_reference.py draws decays, momenta and masks beside max_norm."""
    name = data.draw(st.sampled_from(["SGD", "Adam", "AdamW"]))
    max_norm = data.draw(st.sampled_from([0.01, 0.5, 2.0, 100.0, INF]))
    options: dict[str, Any] = {
        "lr": 0.1,
        "weight_decay": data.draw(st.sampled_from([0.0, 0.1])),
        "maximize": data.draw(st.booleans()),
    }
    if name == "SGD":
        options["momentum"] = data.draw(st.sampled_from([0.0, 0.9]))
    else:
        options |= {"amsgrad": data.draw(st.booleans()), "eps": 1e-3}
    params = parameters(torch.float64)
    others = copy.deepcopy(params)
    ours = getattr(optim, f"AndMask{name}")(params, **options, tau=0.0, max_norm=max_norm)
    theirs = getattr(torch.optim, name)(others, **options)
    for _ in range(4):
        grads = random_grads(params, data.draw(st.integers(1, 3)))
        for other, rows in zip(others, grads, strict=True):
            other.grad = rows.mean(0)
        norm = clip_grad_norm_(others, max_norm)
        theirs.step()
        environments(ours, params, grads)
        ours.step()
        assert_norm(ours, norm)
        assert_close(params, others, 1e-9)


# ---- numbers at the edges ----


@makers
@pytest.mark.parametrize("value", [float("nan"), INF, -INF, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_and_zeros(make: Any, value: float, dtype: torch.dtype) -> None:
    """NaN makes all gradients NaN, an infinity makes zeros of the finite ones."""
    params, optimizer, others, plain = pair(make, 1.0, dtype, tau=0.0)
    grads = random_grads(params)
    for stack in grads:
        if value == 0:
            stack.zero_()
    grads[0][1, 2, 3] = value
    environments(optimizer, params, grads)
    environments(plain, others, grads)
    optimizer.step()
    assert_norm(optimizer, step_by_hand(plain, others, 1.0))
    assert_close(params, others, 1e-5)


@makers
def test_float32_norms_do_not_overflow(make: Any) -> None:
    """Better than torch, whose norm of float32 is infinite here, and whose clipped gradient 0."""
    param = nn.Parameter(torch.zeros(4))
    optimizer = make([param], max_norm=2.0)
    environments(optimizer, [param], [torch.full((2, 4), 1e30)])
    optimizer.step()
    assert_norm(optimizer, 2e30, 1e-6)
    assert param.detach().isfinite().all()
    assert (param.detach() < 0).all()


@makers
def test_no_environment_reaches_a_parameter(make: Any) -> None:
    params = parameters()
    optimizer = make(params, max_norm=1.0)
    before = values(params)
    other = nn.Parameter(torch.ones(2))
    with optimizer.environment():
        other.sum().backward()
    with warnings.catch_warnings():  # that nothing was reached
        warnings.simplefilter("ignore")
        optimizer.step()
    assert_norm(optimizer, 0.0)
    assert_equal(params, before)


@makers
def test_infinity_only_measures(make: Any) -> None:
    params, optimizer, others, plain = pair(make, INF, torch.float32, tau=0.5)
    for _ in range(2):
        grads = random_grads(params)
        environments(optimizer, params, grads)
        environments(plain, others, grads)
        optimizer.step()
        plain.step()
        assert_equal(params, others)
        assert float(optimizer.grad_norm) > 0
        assert plain.grad_norm is None


@makers
def test_a_norm_below_the_largest_changes_no_bit(make: Any) -> None:
    params, optimizer, others, plain = pair(make, 1e6, torch.float32, tau=0.5)
    for _ in range(2):
        grads = random_grads(params)
        environments(optimizer, params, grads)
        environments(plain, others, grads)
        optimizer.step()
        plain.step()
        assert_equal(params, others)


class Called(TorchDispatchMode):
    """Notes which ops of this library run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "andmask":
            self.names.append(func._opname)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("max_norm", [None, 1.0, INF])
def test_one_pass_for_the_norm_and_none_without(name: str, max_norm: float | None) -> None:
    params = parameters()
    optimizer = MAKERS[name](params, max_norm=max_norm)
    environments(optimizer, params, random_grads(params))
    with Called() as called:
        optimizer.step()
    step = "_sgd_step_" if name == "sgd" else "_adam_step_"
    assert called.names == ([step] if max_norm is None else ["_squared_norm", step])
    assert all(p.grad is None for p in params)
