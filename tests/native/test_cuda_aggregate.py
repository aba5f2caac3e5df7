"""The CUDA kernel bodies of aggregate, run thread by thread on the host.

Rules on sums over the environments add up in the order of the CPU kernels, which
test_moments_kernels.py and test_column_kernels.py hold against the definition: so results must have
the same bits, and those of rules on ranked values too as long as both devices sort. Of more
environments the ranks are found another way.
"""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import andmask_ext  # noqa: F401  # its ops
from tests.native import harness
from tests.native.arrays import DTYPES, aligned, placed, same_bits, stored, wide_type
from tests.native.rules import COLUMN_RULES, MOMENT_RULES
from tests.strategies import stacked

native = harness.load()
RANKED_RULES = ["median", "trimmed_mean", "winsorized_mean"]
GROUP = 16  # environments whose moments are added in their own type
TERM_RULES = {rule: a for rule, a in COLUMN_RULES.items() if rule not in RANKED_RULES}
WHOLE_FACTORS = ("mean", "and_mask", "geometric_mean", "agreement_sum")  # 0 or 1: added up exactly

environment_counts = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 64, 100])
column_counts = st.one_of(
    st.integers(1, 40), st.sampled_from([127, 128, 255, 256, 511, 512, 513, 1023, 1024, 1031, 4100])
)
skips = st.sampled_from([0, 0, 0, 1, 3])
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


@st.composite
def gradients(
    draw: st.DrawFn,
    dtype: type,
    environments: st.SearchStrategy[int] = environment_counts,
    finite: bool = False,
) -> NDArray:
    """Stacked gradients, in packs of 16 bytes or such that they cannot be moved that way."""
    like = np.float32 if dtype is np.uint16 else dtype
    values = draw(stacked(like, environments=environments, columns=column_counts, finite=finite))
    columns = values.shape[1]
    pad = draw(st.sampled_from([0, -columns % 8, -columns % 8, 1, 8]))
    grads = placed(np.pad(stored(values, dtype), ((0, 0), (0, pad))), draw(skips))
    return grads[:, :columns]


def noise_like(grads: NDArray, skip: int) -> NDArray:
    random = np.random.default_rng(1).random(grads.shape[1])
    return placed(random.astype(wide_type(grads.dtype.type)), skip)


def by_cuda(
    grads: NDArray,
    rule: str,
    arguments: list[float],
    rescale: bool = False,
    noise: NDArray | None = None,
    skips: tuple[int, int] = (0, 0),
    multiprocessors: int = 2,
) -> NDArray:
    dtype, columns = grads.dtype.type, grads.shape[1]
    out = aligned((columns,), dtype, skips[0])
    # What waits for a second pass does so in the wide type, in place where that is the type.
    waits = dtype in (np.float16, np.uint16)
    wide = aligned((columns,), wide_type(dtype), skips[1]) if waits else out
    native.cuda_aggregate(grads, rule, arguments, rescale, noise, wide, out, multiprocessors)
    return out


def moments_of(grads: NDArray) -> dict[str, NDArray]:
    columns, wide = grads.shape[1], wide_type(grads.dtype.type)
    moments = {kind: np.empty(columns, wide) for kind in ("sum", "squares", "logs")}
    moments["votes"] = np.empty(columns, np.int32)
    native.accumulate("baseline", grads, 0, **moments)
    return moments


@np.errstate(all="ignore")
def joined_moments(grads: NDArray) -> dict[str, NDArray]:
    """The moments of groups of environments, joined in float64."""
    whole = moments_of(grads[:GROUP])
    types = {kind: values.dtype for kind, values in whole.items()}
    if len(grads) <= GROUP:
        return whole
    whole = {kind: values.astype(np.float64) for kind, values in whole.items()}
    for before in range(GROUP, len(grads), GROUP):
        more = moments_of(grads[before : before + GROUP])
        more = {kind: values.astype(np.float64) for kind, values in more.items()}
        rows = min(GROUP, len(grads) - before)
        deviation = more["sum"] / rows - whole["sum"] / before
        share = np.float64(before * rows) / (before + rows)
        squares = whole["squares"] + more["squares"] + deviation * deviation * share
        whole = {kind: whole[kind] + more[kind] for kind in whole} | {"squares": squares}
    return {kind: values.astype(types[kind]) for kind, values in whole.items()}


def moments_by_cpu(
    grads: NDArray, rule: str, arguments: list[float], rescale: bool = False
) -> NDArray:
    environments, columns = grads.shape
    moments = joined_moments(grads)
    update, total = native.resolve("baseline", rule, arguments, environments, **moments)
    if rescale:
        factor = native.inverse_density(total, columns)
        return native.scale("baseline", update, factor, grads[0])
    out = np.empty(columns, grads.dtype)
    native.store("baseline", update, out)
    return out


def widened(array: NDArray) -> NDArray:
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def epsilon(dtype: np.dtype) -> float:
    return {"e": 2.0**-10, "H": 2.0**-7, "f": 2.0**-23, "d": 2.0**-52}[dtype.char]


LARGEST = {"e": 65504.0, "H": 3.3e38, "f": 3.4e38, "d": 1.79e308}
SMALLEST = {"e": 2.0**-24, "H": 2.0**-133, "f": 2.0**-149, "d": 5e-324}


def assert_close(found: NDArray, expected: NDArray, size: NDArray | float, steps: float) -> None:
    """Same NaN and infinities, and else apart by no more than so many roundings of ``size``."""
    kind = found.dtype.char
    # What is all but infinite to one may be infinite to the other.
    one, other = (np.clip(widened(a), -0.98 * LARGEST[kind], 0.98 * LARGEST[kind])
                  for a in (found, expected))  # fmt: skip
    np.testing.assert_array_equal(np.isnan(one), np.isnan(other))
    # Results are rounded to their type once more.
    bound = np.minimum(size, 1e308) * (steps * epsilon(np.dtype(wide_type(found.dtype.type))))
    bound = bound + (epsilon(found.dtype) * np.abs(other) + SMALLEST[kind])
    assert (np.isnan(other) | (np.abs(one - other) <= bound)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", [rule for rule in MOMENT_RULES if rule != "and_mask"])
@given(data=st.data())
def test_the_op_joins_groups_of_environments(rule: str, dtype: type, data: st.DataObject) -> None:
    grads = data.draw(gradients(dtype))
    arguments = (torch.from_numpy(grads), rule, MOMENT_RULES[rule], False, None)
    found = torch.ops.andmask._aggregate.default(*arguments).numpy()
    assert same_bits(found, moments_by_cpu(grads, rule, MOMENT_RULES[rule]))


@by_dtype
@pytest.mark.parametrize("rule", MOMENT_RULES)
@given(data=st.data())
def test_moment_rules_have_the_bits_of_the_cpu(rule: str, dtype: type, data: st.DataObject) -> None:
    grads = data.draw(gradients(dtype))
    arguments = MOMENT_RULES[rule]
    out = by_cuda(grads, rule, arguments, skips=(data.draw(skips), 0))
    assert same_bits(out, moments_by_cpu(grads, rule, arguments))
    rescaled = by_cuda(grads, rule, arguments, True, None, (data.draw(skips), data.draw(skips)))
    expected = moments_by_cpu(grads, rule, arguments, True)
    if rule in WHOLE_FACTORS:
        assert same_bits(rescaled, expected)
    else:
        assert_close(rescaled, expected, np.abs(widened(expected)), 1e2)


@by_dtype
@pytest.mark.parametrize("rule", TERM_RULES)
@given(data=st.data())
def test_term_rules_have_the_bits_of_the_cpu(rule: str, dtype: type, data: st.DataObject) -> None:
    grads = data.draw(gradients(dtype))
    noise = noise_like(grads, data.draw(skips))
    places = (data.draw(skips), data.draw(skips))
    out = by_cuda(grads, rule, TERM_RULES[rule], False, noise, places)
    expected = native.aggregate("baseline", grads, rule, TERM_RULES[rule], noise)
    if rule != "agreement_random":
        assert same_bits(out, expected)
        return
    values = widened(grads)
    whole = np.isfinite(values).all(axis=0)
    kept = ~whole | (np.abs(np.sign(values).sum(axis=0)) == len(grads))
    assert same_bits(out[kept], expected[kept])
    # Noise is scaled by a mean whose terms are added in another order.
    assert_close(out[~kept], expected[~kept], np.abs(widened(expected[~kept])), 1e2)


@pytest.mark.parametrize("rule", ["sand_mask", "agreement_random"])
def test_totals_do_not_depend_on_the_number_of_multiprocessors(rule: str) -> None:
    """With many tiles for each block, too."""
    rng = np.random.default_rng(0)
    columns = 300_001
    grads = (rng.standard_normal((2, columns)) + 0.5).astype(np.float32)
    noise = noise_like(grads, 0)
    arguments = (MOMENT_RULES | TERM_RULES)[rule]
    rescale = rule in MOMENT_RULES
    out = by_cuda(grads, rule, arguments, rescale, noise, multiprocessors=1)
    assert same_bits(out, by_cuda(grads, rule, arguments, rescale, noise, multiprocessors=200))
    expected = (
        moments_by_cpu(grads, rule, arguments, True)
        if rescale
        else native.aggregate("baseline", grads, rule, arguments, noise)
    )
    assert_close(out, expected, np.abs(widened(expected)), 1e2)


# ---- rules on ranked values ----


@st.composite
def ranking(draw: st.DrawFn, rule: str, environments: int) -> list[float]:
    """Arguments of a ranked rule."""
    if rule == "trimmed_mean":
        most = (environments - 1) // 2
        return [float(draw(st.sampled_from([0, min(1, most), most // 2, most])))]
    if rule == "winsorized_mean":
        # Percentiles on a rank, between two of them, and at either end.
        on_a_rank = [100 * rank / max(environments - 1, 1) for rank in (1, 2, environments // 3)]
        tried = [0.0, 1.5, 10.0, 37.5, 50.0, *(c for c in on_a_rank if c <= 50)]
        return [draw(st.sampled_from(tried))]
    return []


def weights_of(rule: str, arguments: list[float], environments: int) -> NDArray:
    """Weights of ranks, from the definition."""
    ranks = np.arange(environments)
    if rule == "winsorized_mean":
        # The mean is linear in each sorted value: a value of 1 or 0 at each rank tells its weight.
        steps = (ranks[:, None] >= ranks).astype(np.float64)  # column r: ones from rank r on
        low = np.percentile(steps, arguments[0], axis=0)
        high = 1 - np.percentile(1 - steps[::-1], arguments[0], axis=0)
        means = np.clip(steps, low, high).mean(axis=0)
        return means - np.append(means[1:], 0)
    dropped = int(arguments[0]) if arguments else (environments - 1) // 2
    inside = (ranks >= dropped) & (ranks < environments - dropped)
    return inside / inside.sum()


@by_dtype
@pytest.mark.parametrize("rule", RANKED_RULES)
@given(data=st.data())
def test_sorted_columns_have_the_bits_of_the_cpu(
    rule: str, dtype: type, data: st.DataObject
) -> None:
    grads = data.draw(gradients(dtype, st.integers(1, 32)))
    arguments = data.draw(ranking(rule, len(grads)))
    out = by_cuda(grads, rule, arguments, skips=(data.draw(skips), 0))
    assert same_bits(out, native.aggregate("baseline", grads, rule, arguments))


def assert_ranked(grads: NDArray, rule: str, arguments: list[float], out: NDArray) -> None:
    """Hold a result against the definition in long doubles, and what is not finite against NaN."""
    values = widened(grads)
    bad = ~np.isfinite(values).all(axis=0)
    assert np.isnan(widened(out)[bad]).all()
    ordered = np.sort(values[:, ~bad], axis=0).astype(np.longdouble)
    weights = weights_of(rule, arguments, len(grads)).astype(np.longdouble)[:, None]
    expected = (weights * ordered).sum(axis=0)
    # Sums are taken in float64: one rounding for each environment, and for each end.
    size = (weights * np.abs(ordered)).sum(axis=0)
    bound = size * (len(grads) + 16) * 2.0**-52 + np.abs(expected) * epsilon(out.dtype) / 2
    found = widened(out)[~bad]
    huge = np.abs(expected) + bound >= LARGEST[out.dtype.char] / len(grads)  # sums may overflow
    kind = np.longdouble(SMALLEST[out.dtype.char])
    assert (huge | (np.abs(found - expected) <= bound * (1 + 2.0**-20) + kind)).all()


@by_dtype
@pytest.mark.parametrize("rule", RANKED_RULES)
@given(data=st.data())
def test_ranks_of_many_environments(rule: str, dtype: type, data: st.DataObject) -> None:
    environments = data.draw(st.sampled_from([33, 34, 39, 40, 64, 65, 100, 257, 400, 1000]))
    columns = st.integers(1, 9) if environments > 100 else st.integers(1, 80)
    like = np.float32 if dtype is np.uint16 else dtype
    counts = st.just(environments)
    values = data.draw(stacked(like, environments=counts, columns=columns))
    if data.draw(st.booleans()):
        values = np.round(values)  # ties everywhere
    pad = data.draw(st.sampled_from([0, 1, 8]))
    grads = placed(np.pad(stored(values, dtype), ((0, 0), (0, pad))), data.draw(skips))
    grads = grads[:, : values.shape[1]]
    arguments = data.draw(ranking(rule, environments))
    out = by_cuda(grads, rule, arguments, skips=(data.draw(skips), 0))
    assert_ranked(grads, rule, arguments, out)
    by_cpu = native.aggregate("baseline", grads, rule, arguments)
    if dtype is not np.float64:
        moderate = np.abs(widened(grads)).max(axis=0) < 1e37  # sums in float32 do not overflow
        size = np.abs(widened(grads[:, moderate])).max(axis=0)
        assert_close(out[moderate], by_cpu[moderate], size, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("environments", [1, 2, 3, 4, 5, 31, 32, 33, 64, 100])
def test_zeros_and_ones_tell_every_weight(dtype: type, environments: int) -> None:
    """Every count of ones, in drawn places: a rank that is off by one shows."""
    rng = np.random.default_rng(environments)
    ones = np.arange(environments + 1)
    above = rng.permuted(np.arange(environments)[:, None] < ones, axis=0)
    for low, high in ((0.0, 1.0), (-1.0, 0.0), (-3.0, 2.0)):
        grads = stored(np.where(above, high, low), dtype)
        for dropped in range((environments + 1) // 2):
            out = by_cuda(grads, "trimmed_mean", [float(dropped)])
            inner = environments - 2 * dropped
            share = np.clip(ones - dropped, 0, inner) / inner
            expected = low + (high - low) * share
            assert np.abs(widened(out) - expected).max() <= 4 * epsilon(out.dtype)


@by_dtype
@pytest.mark.parametrize("rule", RANKED_RULES)
def test_a_hundred_thousand_environments(rule: str, dtype: type) -> None:
    rng = np.random.default_rng(0)
    grads = stored(rng.standard_normal((100_000, 2)), dtype)
    arguments = {"median": [], "trimmed_mean": [30_000.0], "winsorized_mean": [12.3]}[rule]
    out = by_cuda(grads, rule, arguments)
    by_cpu = native.aggregate("baseline", grads, rule, arguments)
    assert_close(out, by_cpu, 5.0, 8)


def test_rows_more_than_two_to_the_31_apart() -> None:
    """So are those that one thread loads together. What is never touched takes no memory."""
    stride, rows, columns = (1 << 28) + 8, 34, 9
    size = 2 * (stride * (rows - 1) + columns)
    not_reserved = 0x4000  # MAP_NORESERVE of Linux
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | not_reserved
    memory = np.frombuffer(mmap.mmap(-1, size, flags), np.float16)
    grads = np.lib.stride_tricks.as_strided(memory, (rows, columns), (2 * stride, 2))
    small = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float16)
    grads[:] = small
    for rule, arguments, step, count in [
        ("mean", [], 1, rows),
        ("sand_mask", [0.3, 2.0], 2, rows),
        ("fed_ilc", [0.4], 2, rows),
        ("trimmed_mean", [3.0], 1, 32),
        ("winsorized_mean", [20.0], 1, rows),
    ]:
        out = by_cuda(grads[:count:step], rule, arguments)
        assert same_bits(out, by_cuda(small[:count:step], rule, arguments)), rule


@pytest.mark.parametrize("rule", ["mean", "sign_dropout", "median"])
@pytest.mark.parametrize("environments", [3, 40])
def test_columns_behind_two_to_the_32_others(rule: str, environments: int) -> None:
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((environments, 1300)).astype(np.float32)
    out = np.empty(1300, np.float32)
    for skipped in (0, 1 << 31, 1 << 32, 5 << 32):
        out[:] = np.nan
        native.cuda_aggregate_behind(grads, rule, skipped, out)
        expected = by_cuda(grads, rule, [], noise=grads[0])
        assert same_bits(out, expected), skipped


@by_dtype
def test_neither_device_nor_alignment_is_part_of_the_result(dtype: type) -> None:
    """Statistics of the tensor are sums over many blocks of columns."""
    drawn = stored(np.random.default_rng(0).standard_normal((2, 5003)) + 1, dtype)
    for rule, arguments in (("sand_mask", [0.2, 1.0]), ("agreement_random", [])):
        results = set()
        for pad, skip in ((5, 0), (0, 0), (5, 1)):
            grads = placed(np.pad(drawn, ((0, 0), (0, pad))), skip)[:, :5003]
            noise = noise_like(grads, skip) if rule == "agreement_random" else None
            for multiprocessors in (1, 100):
                found = by_cuda(
                    grads,
                    rule,
                    arguments,
                    rescale=rule == "sand_mask",
                    noise=noise,
                    skips=(skip, skip),
                    multiprocessors=multiprocessors,
                )
                results.add(found.tobytes())
        assert len(results) == 1
