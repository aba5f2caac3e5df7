"""The kernels of moments and steps, against numpy, for every instruction set of this machine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from .. import strategies
from .arrays import empty_moments, same_bits
from .rules import MOMENT_RULES
from .test_masked_mean_kernels import (
    FORMATS,
    count_votes,
    float_types,
    from_bfloat16,
    isas,
    kernels,
    to_bfloat16,
)

vote_types = pytest.mark.parametrize("vote_type", [np.int8, np.int16, np.int32])
few = st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 127]))
rules = pytest.mark.parametrize("rule", MOMENT_RULES)


def accumulate(
    isa: str, grads: np.ndarray, votes: type = np.int8, **options: object
) -> SimpleNamespace:
    moments = empty_moments(grads.shape[1], grads.dtype.type, votes)
    kernels.accumulate(isa, grads, 0, **vars(moments), **options)
    return moments


def assert_moments(moments: SimpleNamespace, grads: np.ndarray) -> None:
    """``grads`` are the exact values in float64 or float32."""
    wide = grads.astype(np.longdouble)
    rows = len(grads)
    to = FORMATS[moments.sum.dtype.type]
    np.testing.assert_array_equal(moments.votes, count_votes(grads))
    with np.errstate(all="ignore"):
        size = np.abs(wide).sum(0)
        finite = np.isfinite(wide).all(0) & (size < 0.99 * to.largest)
        error = np.abs(moments.sum - wide.sum(0))
        assert (error <= rows * to.eps * size + to.tiny)[finite].all()
        assert not np.isfinite(moments.sum[~np.isfinite(wide).all(0)]).any()
        assert not np.isfinite(moments.logs[~np.isfinite(wide).all(0)]).any()
        logs = np.log(np.abs(wide) + 1e-10)
        error = np.abs(moments.logs - logs.sum(0))
        # log(1 + x) near 0 has the absolute error of its argument
        bound = rows * to.eps * (3 + np.abs(logs).sum(0)) * 2
        assert (error <= bound)[finite].all()
        squares = np.square(wide - wide.mean(0)).sum(0)
        # An error of the running mean, rows * eps * |mean|, shifts every deviation by as much.
        shift = rows * to.eps * np.abs(wide).max(0)
        bound = (
            2 * (shift * np.sqrt(rows * squares) + rows * shift**2) + 9 * rows * to.eps * squares
        )
        in_range = finite & (np.abs(wide).max(0) < np.sqrt(to.largest / rows) / 2)
        error = np.abs(moments.squares - squares)
        assert (error <= bound + to.tiny)[in_range].all()


@float_types
@given(data=st.data(), isa=st.sampled_from(kernels.isas()))
def test_accumulate_matches_numpy(isa: str, dtype: type, data: st.DataObject) -> None:
    grads = data.draw(strategies.stacked(dtype, environments=few))
    splits = sorted(data.draw(st.lists(st.integers(0, grads.shape[1]), max_size=3)))
    votes = data.draw(st.sampled_from([np.int8, np.int16, np.int32]))
    assert_moments(accumulate(isa, grads, votes, splits=splits), grads.astype(np.float64))


@given(data=st.data(), isa=st.sampled_from(kernels.isas()))
def test_accumulate_bfloat16_matches_numpy(isa: str, data: st.DataObject) -> None:
    bits = to_bfloat16(data.draw(strategies.stacked(np.float32, environments=few)))
    assert_moments(accumulate(isa, bits), from_bfloat16(bits).astype(np.float64))


@given(grads=strategies.stacked(np.float32, environments=few), data=st.data())
def test_instruction_sets_chunks_and_splits_give_the_same_bits(
    grads: np.ndarray, data: st.DataObject
) -> None:
    rows, columns = grads.shape
    splits = sorted(data.draw(st.lists(st.integers(0, columns), max_size=4)))
    cut = data.draw(st.integers(0, rows))
    weights = data.draw(st.sampled_from([[], list(np.random.default_rng(0).random(rows) + 0.1)]))
    for array in (grads, grads.astype(np.float64), to_bfloat16(grads)):
        expected = accumulate("baseline", array, weights=weights)
        for isa in kernels.isas():
            found = empty_moments(columns, array.dtype.type, np.int8)
            for part in (slice(0, cut), slice(cut, rows)):  # two calls
                if part.start != part.stop:
                    kernels.accumulate(
                        isa,
                        array[part],
                        part.start,
                        **vars(found),
                        weights=weights[part],
                        splits=splits,
                    )
            for kind, value in vars(expected).items():
                assert same_bits(getattr(found, kind), value), (isa, kind)


@isas
@vote_types
def test_votes_reach_the_end_of_their_type(isa: str, vote_type: type) -> None:
    columns = 150
    sign = np.where(np.arange(columns) % 3 == 0, -1, 1)
    largest = np.iinfo(vote_type).max
    moments = empty_moments(columns, votes=vote_type)
    moments.votes[:] = sign * (largest - 1)
    moments.sum[:] = 0
    grads = sign[None].astype(np.float32)
    kernels.accumulate(isa, grads, largest - 1, sum=moments.sum, votes=moments.votes)
    np.testing.assert_array_equal(moments.votes, sign * largest)


@isas
def test_weights_multiply_all_but_the_votes(isa: str) -> None:
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((5, 700)).astype(np.float32)
    grads[:, :3] = 1e-30
    weights = [1e-20, 0.25, 1.0, 4.0, 8.0]  # the first makes a zero of 1e-30
    weighted = grads * np.array(weights, np.float32)[:, None]
    found, expected = accumulate(isa, grads, weights=weights), accumulate(isa, weighted)
    for kind in ("sum", "squares", "logs"):
        assert getattr(found, kind).tobytes() == getattr(expected, kind).tobytes()
    np.testing.assert_array_equal(found.votes, count_votes(grads))
    assert (found.votes[:3] == 5).all()
    assert (expected.votes[:3] == 4).all()


@isas
@pytest.mark.parametrize("dtype", [np.float32, np.uint16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mean", [1e4, -3e6, 1e-10])
@pytest.mark.parametrize("rows", [2, 7, 64, 300])
def test_squares_do_not_cancel(isa: str, dtype: type, mean: float, rows: int) -> None:
    """The mean is 10^4 times the spread; the sum of squares would leave nothing right."""
    noise = np.random.default_rng(0).standard_normal((rows, 513))
    grads = (mean * (1 + 1e-4 * noise)).astype(np.float32)
    stored = to_bfloat16(grads) if dtype == np.uint16 else grads
    exact = (from_bfloat16(stored) if dtype == np.uint16 else stored).astype(np.float64)
    moments = accumulate(isa, stored, np.int16)
    expected = np.square(exact - exact.mean(0)).sum(0)
    if dtype == np.float32:
        assert (expected > 0).all()
    # Deviations are 1e-4 |mean|; running means are right to rows * 2^-24 |mean| at worst.
    atol = (2 * 2.0**-24 * rows**0.5 * abs(mean)) ** 2 * rows
    np.testing.assert_allclose(moments.squares, expected, rtol=0.02, atol=atol)


# ---- resolve ----

KEPT = {"mean": [], "geometric_mean": ["votes", "logs"], "sand_mask": ["votes", "squares"]}


def arguments(rule: str, tau: float) -> list[float]:
    return [tau, 1e2][: len(MOMENT_RULES[rule])]


def numpy_rule(rule: str, grads: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """Factor and value of each column, in float64."""
    rows = len(grads)
    votes = np.abs(count_votes(grads))
    agrees = votes >= kernels.vote_threshold(1 if rule == "agreement_sum" else tau, rows)
    mean = grads.mean(0)
    if rule == "mean":
        return np.ones_like(mean), mean
    if rule == "geometric_mean":
        logs = np.log(np.abs(grads) + 1e-10)
        return agrees.astype(float), np.sign(mean) * np.exp(logs.mean(0))
    if rule == "sand_mask":
        variance = grads.var(0, ddof=1) if rows > 1 else np.full_like(mean, 1e-17)
        return np.maximum(np.tanh(1e2 * (votes / rows - tau) / variance), 0), mean
    if rule == "masked_average":
        return np.where(agrees, 1, votes / rows), mean
    values = {"and_mask": mean, "agreement_sum": grads.sum(0)}
    return agrees.astype(float), values[rule]


@rules
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(data=st.data(), isa=st.sampled_from(kernels.isas()))
def test_resolve_matches_numpy(isa: str, rule: str, dtype: type, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shape = data.draw(few), data.draw(strategies.column_counts)
    grads = rng.standard_normal(shape).astype(dtype)
    if rule != "sand_mask":  # a variance of 0 is of interest to tests of the rule, not of the loop
        grads[rng.random(shape) < 0.1] = 0
    tau = data.draw(strategies.tie_taus(len(grads)).filter(lambda t: rule != "sand_mask" or t < 1))
    tau = tau + 1e-4 if rule == "sand_mask" else tau
    splits = sorted(data.draw(st.lists(st.integers(0, shape[1]), max_size=3)))
    scale = data.draw(st.sampled_from([1.0, 2.5]))
    kinds = ["sum", *KEPT.get(rule, ["votes"])]
    moments = vars(accumulate(isa, grads))
    update, total = kernels.resolve(
        isa,
        rule,
        arguments(rule, tau),
        len(grads),
        **{kind: moments[kind] for kind in kinds},  # the others are not touched: null
        scale=scale,
        splits=splits,
    )
    assert update.dtype == dtype
    factor, value = numpy_rule(rule, grads.astype(np.float64), tau)
    eps = float(np.finfo(dtype).eps)
    size = np.abs(grads.astype(np.float64)).sum(0) + np.abs(value)
    atol = 40 * len(grads) * eps * size * scale
    error = np.abs(update - factor * value * scale)
    assert (error <= atol + 200 * eps).all()
    assert total == pytest.approx(factor.sum(), rel=200 * eps)
    if rule in ("and_mask", "agreement_sum", "geometric_mean"):
        assert total == factor.sum()  # a count is exact


@isas
@rules
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_resolve_shows_what_is_not_finite(isa: str, rule: str, value: float) -> None:
    rng = np.random.default_rng(0)
    for row in range(3):
        grads = rng.standard_normal((3, 600)).astype(np.float32)
        grads[row, ::7] = value
        update, _ = kernels.resolve(
            isa, rule, arguments(rule, 1.0), 3, **vars(accumulate(isa, grads))
        )
        assert not np.isfinite(update[::7]).any()
        assert np.isfinite(np.delete(update, np.s_[::7])).all()


@rules
@given(grads=strategies.stacked(np.float32, environments=few), data=st.data())
def test_resolve_gives_the_same_bits_on_every_instruction_set(
    rule: str, grads: np.ndarray, data: st.DataObject
) -> None:
    tau = data.draw(strategies.taus)
    for array in (grads, grads.astype(np.float64)):
        moments = vars(accumulate("baseline", array))
        results = [
            kernels.resolve(isa, rule, arguments(rule, tau), len(grads), **moments, scale=1.25)
            for isa in kernels.isas()
        ]
        for update, total in results:
            assert same_bits(update, results[0][0])
            assert same_bits(np.array(total), np.array(results[0][1]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(data=st.data())
def test_a_factor_of_the_update_multiplies_last(dtype: type, data: st.DataObject) -> None:
    grads = data.draw(strategies.stacked(dtype, environments=few))
    scale, factor = (
        data.draw(st.sampled_from([1.0, 2.5])),
        data.draw(st.sampled_from([0.3, np.nan])),
    )
    moments = vars(accumulate("baseline", grads))
    arguments_ = ("and_mask", [0.6], len(grads))
    plain, _ = kernels.resolve("baseline", *arguments_, **moments, scale=scale)
    for isa in kernels.isas():
        found, _ = kernels.resolve(isa, *arguments_, **moments, scale=scale, grad_scale=factor)
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(found, plain * dtype(factor))
        one, _ = kernels.resolve(isa, *arguments_, **moments, scale=scale, grad_scale=1.0)
        assert same_bits(one, plain)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(data=st.data())
def test_squared_norm_matches_numpy(dtype: type, data: st.DataObject) -> None:
    update = data.draw(strategies.stacked(dtype, environments=st.just(1)))[0]
    with np.errstate(all="ignore"):
        expected = np.square(update.astype(np.longdouble)).sum().astype(np.float64)
    found = [kernels.squared_norm(isa, update) for isa in kernels.isas()]
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    assert all(same_bits(np.array(one), np.array(found[0])) for one in found)


# ---- steps ----


def same_bits_everywhere(step: object, *arrays: np.ndarray) -> list[np.ndarray]:
    """Run ``step(isa, *copies)`` on every instruction set; return what it makes of the copies."""
    results = []
    for isa in kernels.isas():
        copies = [array.copy() for array in arrays]
        step(isa, *copies)
        results.append(copies)
    for copies in results[1:]:
        for one, other in zip(results[0], copies, strict=True):
            assert same_bits(one, other)
    return results[0]


@pytest.mark.parametrize("dtype", [np.float16, np.uint16, np.float32, np.float64])
@given(data=st.data())
def test_steps_give_the_same_bits_on_every_instruction_set(
    dtype: type, data: st.DataObject
) -> None:
    wide = np.float64 if dtype == np.float64 else np.float32
    drawn = data.draw(strategies.stacked(wide, environments=st.just(5)))
    with np.errstate(over="ignore", invalid="ignore"):
        param = to_bfloat16(drawn[0]) if dtype == np.uint16 else drawn[0].astype(dtype)
    update, first, signs = drawn[1], drawn[2], np.clip(np.nan_to_num(drawn[4]), -1, 1)
    second = np.abs(drawn[3])
    flags = {
        "decoupled_weight_decay": data.draw(st.booleans()),
        "maximize": data.draw(st.booleans()),
        "weight_decay": data.draw(st.sampled_from([0.0, 0.1])),
    }
    nesterov, fresh = data.draw(st.booleans()), data.draw(st.booleans())

    def sgd(isa: str, param: np.ndarray, buffer: np.ndarray) -> None:
        kernels.sgd(
            isa, param, buffer, update, 0.1, 0.9, 0.3, nesterov=nesterov, first=fresh, **flags
        )

    def plain(isa: str, param: np.ndarray) -> None:
        kernels.sgd(isa, param, None, update, 0.1, **flags)

    def adam(isa: str, param: np.ndarray, *state: np.ndarray) -> None:
        kernels.adam(isa, param, *state, None, update, [0.19, 0.3], 1e-2, [0.9, 0.99], **flags)

    def temporal(isa: str, param: np.ndarray, m: np.ndarray, v: np.ndarray, a: np.ndarray) -> None:
        kernels.adam(
            isa, param, m, v, None, a, update, [1, 1, 0.7], 1e-2, [0.9, 0.9, 0.6], tau=0.5, **flags
        )

    same_bits_everywhere(plain, param)
    same_bits_everywhere(sgd, param, first)
    same_bits_everywhere(lambda isa, p, m, v: adam(isa, p, m, v, None), param, first, second)
    same_bits_everywhere(adam, param, first, second, second[::-1].copy())
    same_bits_everywhere(temporal, param, first, second, signs)


@isas
def test_store_rounds_to_nearest_even(isa: str) -> None:
    update = np.random.default_rng(0).standard_normal(1500).astype(np.float32)
    for out in (np.empty(1500, np.float16), np.empty(1500, np.uint16), np.empty(1500, np.float32)):
        kernels.store(isa, update, out)
        expected = to_bfloat16(update) if out.dtype == np.uint16 else update.astype(out.dtype)
        np.testing.assert_array_equal(out, expected)


@isas
def test_adam_keeps_the_largest_square_and_lets_nan_through(isa: str) -> None:
    columns = 30
    param, m, v = np.zeros(columns), np.zeros(columns), np.zeros(columns)
    largest = np.linspace(0, 2, columns)
    update = np.ones(columns)
    update[4] = np.nan
    before = largest.copy()
    kernels.adam(isa, param, m, v, largest, None, update, [0.5, 0.5], 0.1, [0.5, 0.5])
    assert np.isnan(largest[4])
    np.testing.assert_array_equal(np.delete(largest, 4), np.delete(np.maximum(before, 0.5), 4))


def test_harness_refuses_a_rule_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="rule"):
        kernels.resolve("baseline", "median", [], 1, sum=np.zeros(2, np.float32))
