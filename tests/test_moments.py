"""andmask_ext.Moments: what producers add is what rules find, however it came."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import andmask_ext as am

from . import strategies

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
KINDS = ("votes", "squares", "logs")
SHAPES = [(4, 3), (), (0, 2), (17,)]
few = st.one_of(st.integers(1, 12), st.sampled_from([127, 128, 130]))


def stacks(environments: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(environments, *shape).to(dtype) for shape in SHAPES]


def new(dtype: torch.dtype = torch.float32, kinds: tuple[str, ...] = KINDS) -> am.Moments:
    return am.Moments([torch.zeros(shape, dtype=dtype) for shape in SHAPES], kinds)


def add_one_by_one(
    moments: am.Moments, grads: list[Tensor], weights: list[float] | None = None
) -> am.Moments:
    for row in range(len(grads[0])):
        moments.add([stack[row] for stack in grads], 1.0 if weights is None else weights[row])
    return moments


def assert_equal(one: am.Moments, other: am.Moments, exact: bool = True) -> None:
    assert one.count == other.count
    assert one.kinds == other.kinds
    for kind in ("sum", *one.kinds):
        for a, b in zip(getattr(one, kind), getattr(other, kind), strict=True):
            assert (a is None) == (b is None)
            if a is None:
                continue
            if exact or kind == "votes":
                assert torch.equal(a.double(), b.double()), kind
            else:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def assert_holds(moments: am.Moments, grads: list[Tensor]) -> None:
    """Against float64 sums of stacked gradients, finite and of ordinary size."""
    assert moments.count == len(grads[0])
    for index, stack in enumerate(grads):
        wide = stack.double()
        tight = {"rtol": 1e-9, "atol": 1e-9} if stack.dtype == torch.float64 else {}
        loose = tight or {"rtol": 1e-4, "atol": 1e-4 * len(stack)}

        def check(kind: str, expected: Tensor, index: int = index, loose: dict = loose) -> None:
            found = getattr(moments, kind)[index].double()
            torch.testing.assert_close(found, expected, **loose)

        check("sum", wide.sum(0))
        check("squares", (wide - wide.mean(0)).square().sum(0))
        check("logs", (wide.abs() + 1e-10).log().sum(0))
        votes = (wide > 0).sum(0) - (wide < 0).sum(0)
        assert torch.equal(moments.votes[index].long(), votes)


# ---- producers ----


@dtypes
@given(data=st.data())
def test_holds_the_sums_of_what_was_added(dtype: torch.dtype, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    grads = stacks(data.draw(few), dtype)
    if data.draw(st.booleans()):
        for stack in grads:
            stack[torch.rand(stack.shape) < 0.2] = 0
    one = add_one_by_one(new(dtype), grads)
    assert_holds(one, grads)
    stacked = new(dtype)
    cut = data.draw(st.integers(0, len(grads[0])))
    for part in (slice(0, cut), slice(cut, None)):
        if len(grads[0][part]):
            stacked.add_stacked([stack[part] for stack in grads])
    assert_equal(one, stacked)  # the same bits
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in (*one.sum, *one.squares, *one.logs)} == {wide}


@pytest.mark.parametrize(
    ("before", "narrow", "wide"),
    [(127, torch.int8, torch.int16), (32767, torch.int16, torch.int32)],
    ids=["int8", "int16"],
)
@pytest.mark.parametrize("how", ["add", "add_stacked", "merge"])
def test_votes_are_widened_before_they_overflow(
    how: str, before: int, narrow: torch.dtype, wide: torch.dtype
) -> None:
    sign = torch.tensor([1.0, -1.0, 0.0])
    moments = am.Moments([torch.zeros(3)])
    moments.add_stacked([sign.expand(before, 3)])
    assert moments.votes[0].dtype == narrow
    assert moments.votes[0].tolist() == [before, -before, 0]
    if how == "add":
        moments.add([sign])
    elif how == "add_stacked":
        moments.add_stacked([sign.expand(1, 3)])
    else:
        other = am.Moments([torch.zeros(3)])
        other.add([sign])
        moments.merge(other)
    assert moments.votes[0].dtype == wide
    assert moments.votes[0].tolist() == [before + 1, -before - 1, 0]
    assert am.AndMask(1.0).update(moments)[0].tolist() == [1.0, -1.0, 0.0]
    moments.reset()
    moments.add([sign])  # in the memory that is there
    assert moments.votes[0].tolist() == [1, -1, 0]


def test_a_parameter_that_comes_late_has_wide_votes_too() -> None:
    one, late = torch.zeros(2), torch.zeros(2)
    moments = am.Moments([one, late], KINDS)
    grad = torch.tensor([2.0, -2.0])
    for _ in range(200):
        moments.add([grad, None])
    for _ in range(3):
        moments.add([grad, grad])
    assert moments.votes[1].tolist() == [3, -3]
    stack = torch.cat([torch.zeros(200, 2), grad.expand(3, 2)])
    for index, expected in enumerate((grad.expand(203, 2), stack)):
        exact = expected.double()
        logs = (exact.abs() + 1e-10).log().sum(0)
        squares = (exact - exact.mean(0)).square().sum(0)
        torch.testing.assert_close(moments.logs[index].double(), logs, rtol=1e-5, atol=0)
        torch.testing.assert_close(moments.squares[index].double(), squares, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kinds", [(), ("votes",), ("squares",), ("logs",), KINDS])
@pytest.mark.parametrize("given_in", [(0,), (2,), (1, 2), (0, 1), (), (0, 1, 2)], ids=str)
def test_none_is_a_gradient_of_zeros(kinds: tuple[str, ...], given_in: tuple[int, ...]) -> None:
    """Wherever it stands, also first; with add and with add_stacked."""
    grads = torch.randn(3, 5)
    always = torch.randn(3, 2)
    found, expected = (am.Moments([torch.zeros(2), torch.zeros(5)], kinds) for _ in range(2))
    for row in range(3):
        grad = grads[row] if row in given_in else None
        found.add([always[row], grad])
        expected.add([always[row], torch.zeros(5) if grad is None else grad])
    if given_in:
        assert_equal(found, expected, exact=False)
    else:
        assert found.sum[1] is None  # no environment has touched it
        assert am.rules.Mean().update(found)[1] is None
    stacked = am.Moments([torch.zeros(2), torch.zeros(5)], kinds)
    for row in range(3):
        part = slice(row, row + 1)
        stacked.add_stacked([always[part], grads[part] if row in given_in else None])
    assert_equal(stacked, found)


def test_an_environment_without_any_gradient_counts() -> None:
    moments = am.Moments([torch.zeros(2)])
    moments.add([None])
    assert am.AndMask(1.0).update(moments) == [None]
    moments.add([torch.tensor([4.0, 2.0])])
    assert moments.count == 2
    assert am.AndMask(0.5).update(moments)[0].tolist() == [2.0, 1.0]
    assert am.AndMask(1.0).update(moments)[0].tolist() == [0.0, 0.0]


@dtypes
@given(data=st.data())
def test_weights_are_factors_of_the_losses(dtype: torch.dtype, data: st.DataObject) -> None:
    """Ragged environments: d * n_e / N makes the unmasked mean that of all examples."""
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=6))
    weights = [len(sizes) * size / sum(sizes) for size in sizes]
    grads = stacks(len(sizes), dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factors = torch.tensor(weights, dtype=wide)
    scaled = [g.to(wide) * factors.view(-1, *[1] * (g.dim() - 1)) for g in grads]
    weighted = new(dtype)
    weighted.add_stacked(grads, weights)
    assert_equal(weighted, add_one_by_one(new(dtype), grads, weights))
    assert_holds(weighted, [s.to(wide) for s in scaled])
    pooled = sum(size * grad for size, grad in zip(sizes, grads[0].double(), strict=True))
    mean = am.rules.Mean().update(weighted)[0].double()
    torch.testing.assert_close(
        mean, pooled / sum(sizes), rtol=2 * torch.finfo(dtype).eps, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 4])
def test_squares_do_not_cancel(dtype: torch.dtype, parts: int) -> None:
    """Means 10^4 times the spread, merged too, against float64 of the stored values."""
    grads = (1e4 + torch.randn(64, 1000)).to(dtype)
    exact = grads.double()
    expected = (exact - exact.mean(0)).square().sum(0)
    moments = am.Moments([torch.zeros(1000, dtype=dtype)], KINDS)
    for part in grads.chunk(parts):
        one = am.Moments([torch.zeros(1000, dtype=dtype)], KINDS)
        one.add_stacked([part])
        moments.merge(one)
    # The float32 mean is right to 5e-4 or so: its square, 64 times, is what may be missing.
    torch.testing.assert_close(moments.squares[0].double(), expected, rtol=0.01, atol=1e-3)


# ---- layout and devices ----


@dtypes
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded"])
def test_memory_lies_as_the_parameter_does(dtype: torch.dtype, layout: str) -> None:
    param = {
        "channels_last": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.zeros(2, 4, 3, 5).transpose(1, 2),
        "expanded": torch.zeros(3, 4, 5).expand(2, 3, 4, 5),
    }[layout].to(dtype)
    strides = torch.empty_like(param).stride()
    grads = torch.randn(4, 2, 3, 4, 5).to(dtype)
    moments = am.Moments([param], KINDS)
    for grad in grads[:3]:
        moments.add([torch.empty_like(param).copy_(grad)])
    moments.add([grads[3]])  # of another layout
    assert_holds(moments, [grads])
    (update,) = am.AndMask(0.6).update(moments)
    assert update.stride() == strides
    assert update.dtype == dtype
    for kind in ("sum", *KINDS):
        assert getattr(moments, kind)[0].stride() == strides


def test_a_parameter_may_change_its_dtype_between_steps() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    moments = am.Moments([param])
    moments.add([torch.ones(3)])
    param.data = param.data.double()
    moments.reset()
    moments.add([torch.full((3,), 1 + 1e-12, dtype=torch.float64)])
    assert am.rules.Mean().update(moments)[0].tolist() == [1 + 1e-12] * 3


# ---- consumers ----


@dtypes
@given(data=st.data(), rescale=st.booleans())
def test_a_sweep_of_tau_equals_masked_mean_at_each(
    dtype: torch.dtype, rescale: bool, data: st.DataObject
) -> None:
    kind = np.float64 if dtype == torch.float64 else np.float32
    stack = torch.as_tensor(data.draw(strategies.stacked(kind, True, few))).to(dtype)
    moments = am.Moments([torch.zeros(stack.shape[1:], dtype=dtype)])
    moments.add_stacked([stack])
    scale = stack.double().abs().mean(0)
    for k in range(0, len(stack) + 1, max(1, len(stack) // 5)):
        rule = am.AndMask(k / len(stack), rescale)
        (found,), expected = rule.update(moments), rule(stack)
        mask = am.ops.agreement_mask(stack, rule.tau)
        factor = am.ops.agreement_mask(stack, rule.tau, rescale).max().item()
        assert torch.equal(found[mask == 0], expected[mask == 0])
        error = (found.double() - expected.double()).abs()
        eps = torch.finfo(dtype).eps + len(stack) * torch.finfo(moments.sum[0].dtype).eps
        bound = 4 * eps * max(factor, 1) * scale + torch.finfo(dtype).tiny
        assert (~found.isfinite() | (error <= bound)).all()
        assert torch.equal(found.isfinite(), expected.isfinite())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_in_any_environment_shows(value: float) -> None:
    for row in range(3):
        grads = torch.randn(3, 10)
        grads[row, 4] = value
        moments = am.Moments([torch.zeros(10)], KINDS)
        moments.add_stacked([grads])
        for rule in (am.rules.Mean(), am.AndMask(1.0), am.AndMask(1.0, rescale=True)):
            assert rule.update(moments)[0].isfinite().tolist() == [i != 4 for i in range(10)]


def test_resolve_changes_nothing() -> None:
    moments = add_one_by_one(new(), stacks(5))
    before = copy.deepcopy(moments)
    first = am.AndMask(0.6, True).update(moments)
    assert_equal(moments, before)
    for one, other in zip(first, am.AndMask(0.6, True).update(moments), strict=True):
        assert torch.equal(one, other)


def test_gradients_that_require_grad_leave_no_graph() -> None:
    moments = am.Moments([torch.zeros(3)])
    moments.add([torch.ones(3, requires_grad=True) * 2])
    assert not moments.sum[0].requires_grad
    assert not am.rules.Mean().update(moments)[0].requires_grad


# ---- errors ----

ONE = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: am.Moments([1.0]), TypeError, r"params\[0\]: expected a Tensor, but got float"),
        (lambda m: am.Moments([ONE.long()]), TypeError, r"params\[0\]: .* but got int64"),
        (lambda m: am.Moments([ONE], ["vote"]), ValueError, "kinds: .* but got 'vote'"),
        (lambda m: m.add([ONE, ONE]), ValueError, "grads: expected 1, .* but got 2"),
        (lambda m: m.add(ONE), TypeError, "grads: expected a sequence"),
        (lambda m: m.add([torch.ones(4)]), ValueError, r"shape \(3,\), but got \(4,\)"),
        (lambda m: m.add([ONE.double()]), TypeError, "dtype float32, but got float64"),
        (lambda m: m.add([ONE.long()]), (TypeError, RuntimeError), "(?i)but got (long|int64)"),
        (lambda m: m.add([ONE.to_sparse()]), TypeError, r"dense .*sparse_coo .*sparse=True"),
        (lambda m: m.add([2.0]), TypeError, r"grads\[0\]: expected a Tensor, but got float"),
        (lambda m: m.add([ONE], 0.0), ValueError, "weight: .* but got 0.0"),
        (lambda m: m.add([ONE], math.inf), ValueError, "weight: .* but got inf"),
        (lambda m: m.add([ONE], "2"), TypeError, "weight: .* but got str"),
        (lambda m: m.add_stacked([None]), ValueError, "at least one tensor, but got None only"),
        (lambda m: m.add_stacked([2.0]), TypeError, r"grads\[0\]: .* but got float"),
        (lambda m: m.add_stacked([torch.ones(0, 3)]), ValueError, "at least 1 environment"),
        (lambda m: m.add_stacked([ONE]), ValueError, r"shape \(3, 3\), but got \(3,\)"),
        (lambda m: m.add_stacked([ONE[None]], [1.0, 2.0]), ValueError, "weights: expected 1,"),
        (lambda m: m.add_stacked([ONE[None]], [-1.0]), ValueError, "weight: .* but got -1.0"),
        (lambda m: m.squares, AttributeError, r"squares are not kept: pass kinds="),
        (lambda m: m.merge(new()), ValueError, "other: expected moments like"),
    ],
)
def test_mistakes_are_named_and_change_nothing(
    call: object, error: type[Exception], message: str
) -> None:
    moments = am.Moments([torch.zeros(3)])
    moments.add([ONE])
    before = copy.deepcopy(moments)
    with pytest.raises(error, match=message):
        call(moments)
    assert_equal(moments, before)
    moments.add([ONE])  # and it goes on
    assert am.AndMask(1.0).update(moments)[0].tolist() == [1.0] * 3


def test_a_rule_needs_its_moments() -> None:
    moments = am.Moments([torch.zeros(3)], ())
    moments.add([ONE])
    with pytest.raises(ValueError, match=r"expected sum \+ votes for AndMask.* but got sum"):
        am.AndMask(1.0).update(moments)


def test_repr() -> None:
    assert repr(add_one_by_one(new(), stacks(2))) == (
        "Moments(2 environments, 4 of 4 parameters, sum + votes + squares + logs)"
    )
