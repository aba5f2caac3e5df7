"""The op _squared_norm, and the factor grad_scale of the optimizer steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from andmask_ext import reference

from ..strategies import stacked
from .moments import KINDS, RULES, STATE, Case, assert_same, case, dtypes, ops
from .test_moments_ops import LAYOUTS

rules = pytest.mark.parametrize("rule", RULES)
SIZES = [(50_000,), (3,), (0, 4), (), (20_001,)]


def squared_norm(c: Case) -> Tensor:
    found: Tensor = ops._squared_norm(*c.rule_args())
    assert found.shape == ()
    assert found.dtype == torch.float64
    return found


def assert_is_norm_of(found: Tensor, updates: list[Tensor]) -> None:
    """Updates of float32 and float64 are the very numbers whose squares are added up."""
    expected = reference.total_norm(updates) ** 2
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, equal_nan=True)


@rules
@dtypes
@pytest.mark.parametrize("rescale", [False, True])
def test_the_norm_of_all_updates_together(rule: str, dtype: torch.dtype, rescale: bool) -> None:
    c = case(dtype, shapes=SIZES, rule=rule, arguments=RULES[rule], rescale=rescale)
    before = c.after("__str__")
    assert_is_norm_of(squared_norm(c), c.resolve())
    assert_same(c, before, *KINDS, *STATE)


@rules
@given(data=st.data())
def test_drawn_values(rule: str, data: st.DataObject) -> None:
    """Zeros, subnormals, what is not finite, and float32 whose squares are beyond float32."""
    few = stacked(environments=st.integers(1, 20))
    grads = torch.from_numpy(data.draw(few)).to(torch.get_default_device())
    shapes = [tuple(grads.shape[1:])]
    c = case(rows=len(grads), shapes=shapes, rule=rule, arguments=RULES[rule], rescale=False)
    c = c.after("accumulate", grads=[grads], added=0)
    assert_is_norm_of(squared_norm(c), c.resolve())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_plain_gradients_in_16_bits(dtype: torch.dtype) -> None:
    grads = [torch.randn(shape).to(dtype) for shape in SIZES]
    assert_is_norm_of(ops._squared_norm(grads, *[[]] * 4, 1, "mean", []), grads)


def test_a_list_of_float32_and_float64() -> None:
    one, other = case(torch.float32, shapes=SIZES[:2]), case(torch.float64, shapes=SIZES[1:])
    for kind in KINDS:
        setattr(one, kind, getattr(one, kind) + getattr(other, kind))
    assert_is_norm_of(squared_norm(one), one.resolve())


def test_nothing_overflows_or_vanishes_that_float32_holds() -> None:
    for value in (3e38, 1e-38, 1e-45):
        grads = [torch.full((9,), value)]
        found = ops._squared_norm(grads, *[[]] * 4, 1, "mean", []).sqrt()
        torch.testing.assert_close(found, 3 * grads[0][0].double(), rtol=1e-12, atol=0)


def test_float64_overflows_as_in_torch() -> None:
    grads = [torch.full((4,), 1e200, dtype=torch.float64)]
    found = ops._squared_norm(grads, *[[]] * 4, 1, "mean", []).sqrt()
    assert torch.equal(found, torch.nn.utils.get_total_norm(grads))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 511, 12_345, 49_999])
def test_what_is_not_finite_shows(value: float, place: int) -> None:
    c = case(shapes=SIZES, rule="mean", arguments=[], rescale=False)
    c.sum[0][place] = value
    expected = torch.tensor(value, dtype=torch.float64).square()
    torch.testing.assert_close(squared_norm(c), expected, equal_nan=True)


def test_nothing_but_empty_tensors() -> None:
    assert float(squared_norm(case(shapes=[(0,), (3, 0)]))) == 0


@dtypes
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    c = case(dtype, shapes=SIZES)
    found = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        found.append(squared_norm(c))
    assert all(torch.equal(one, found[0]) for one in found)


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kinds", [KINDS, ("sum",), ("votes",)])
def test_any_layout_gives_the_same_value(
    dtype: torch.dtype, layout: str, kinds: tuple[str, ...]
) -> None:
    c = case(dtype, shapes=[(2, 3, 4, 5)])
    expected = squared_norm(c)
    for kind in kinds:
        setattr(c, kind, [LAYOUTS[layout](getattr(c, kind)[0])])
    torch.testing.assert_close(squared_norm(c), expected, rtol=1e-12, atol=0)


# ---- torch.library ----


@dtypes
def test_opcheck(dtype: torch.dtype) -> None:
    c = case(dtype)
    torch.library.opcheck(ops._squared_norm.default, c.rule_args())
    for op, (args, kwargs) in {
        ops._sgd_step_: c.sgd_args(),
        ops._adam_step_: c.adam_args(),
    }.items():
        scale = torch.tensor(0.5, dtype=torch.float64)
        torch.library.opcheck(op.default, args, {**kwargs, "grad_scale": scale})


def test_it_compiles_and_requires_no_grad() -> None:
    c = case()
    for total in c.sum:
        total.requires_grad_()
    assert not squared_norm(c).requires_grad
    compiled = torch.compile(lambda args: ops._squared_norm(*args), fullgraph=True)
    assert torch.equal(compiled(c.rule_args()), squared_norm(c))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sum": []}, "sum of at least 1 tensor, but got 0"),
        ({"count": 0}, "count in .* but got 0"),
        ({"rule": "median"}, "but got median"),
        ({"votes": []}, r"votes of 4 tensors, as sum has \(rule and_mask needs them\), but got 0"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    c = case()
    args = Case(**{**vars(c), **changes}).rule_args()
    if changes == {"sum": []}:  # torch finds the kernel by the other lists
        args = ([], *args[1:])
    with pytest.raises(RuntimeError, match=f"andmask::_squared_norm: expected .*{message}"):
        ops._squared_norm(*args)


# ---- grad_scale ----

STEPS = {"sgd": (ops._sgd_step_, Case.sgd_args), "adam": (ops._adam_step_, Case.adam_args)}
steps = pytest.mark.parametrize("name", STEPS)


def after_step(name: str, c: Case, scale: float | None, **changes: Any) -> Case:
    copy = c.after("__str__", **changes)
    op, args_of = STEPS[name]
    args, kwargs = args_of(copy)
    factor = None if scale is None else torch.tensor(scale, dtype=torch.float64)
    op(*args, **kwargs, grad_scale=factor)
    return copy


@steps
@dtypes
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("scale", [0.3, 0.0, 1e-30, float("nan"), float("inf")])
def test_a_step_multiplies_the_update(
    name: str, dtype: torch.dtype, rescale: bool, scale: float
) -> None:
    """To the bit as a step along updates that were written and multiplied."""
    c = case(dtype, shapes=SIZES, rescale=rescale)
    updates = [update * scale for update in c.resolve()]
    plain = {
        "rule": "mean",
        "arguments": [],
        "votes": [],
        "voters": [],
        "count": 1,
        "rescale": False,
    }
    expected = after_step(name, c, None, **plain, sum=updates)
    assert_same(after_step(name, c, scale), expected, *STATE)


@steps
@dtypes
def test_a_factor_of_one_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    c = case(dtype, shapes=SIZES)
    c.sum[0][:4] = torch.tensor([0.0, -0.0, float("nan"), float("inf")])
    assert_same(after_step(name, c, 1.0), after_step(name, c, None), *STATE)


@steps
@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.tensor(1.0), r"grad_scale of one float64, shape \(\), but got shape \(\) of Float"),
        (torch.ones(1, dtype=torch.float64), r"but got shape \(1\) of Double"),
    ],
)
def test_factors_that_are_refused_change_nothing(name: str, scale: Tensor, message: str) -> None:
    c = case()
    before = c.after("__str__")
    op, args_of = STEPS[name]
    args, kwargs = args_of(c)
    with pytest.raises(RuntimeError, match=message):
        op(*args, **kwargs, grad_scale=scale)
    assert_same(c, before, *KINDS, *STATE)
