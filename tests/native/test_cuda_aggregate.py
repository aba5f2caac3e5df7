"""The CUDA kernel bodies of aggregate, run thread by thread on the host.

Rules on sums over the environments add up in the order of the CPU kernels, which
test_moments_kernels.py and test_column_kernels.py hold against the definition: so results must have
the same bits.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.native import harness
from tests.native.cuda_arrays import DTYPES, aligned, placed, same_bits, stored, wide_type
from tests.strategies import stacked

native = harness.load()
MOMENT_RULES = {
    "mean": [],
    "and_mask": [0.5],
    "geometric_mean": [0.4],
    "sand_mask": [0.3, 2.0],
    "masked_average": [0.6],
    "agreement_sum": [],
}
TERM_RULES = {"sign_dropout": [], "fed_ilc": [0.4], "agreement_random": []}
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
    values = draw(
        stacked(like, environments=environments, columns=column_counts, finite=finite)
    )
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


def moments_by_cpu(
    grads: NDArray, rule: str, arguments: list[float], rescale: bool = False
) -> NDArray:
    environments, columns = grads.shape
    wide = wide_type(grads.dtype.type)
    moments = {kind: np.empty(columns, wide) for kind in ("sum", "squares", "logs")}
    moments["votes"] = np.empty(columns, np.int32)
    native.accumulate("baseline", grads, 0, **moments)
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


@by_dtype
@pytest.mark.parametrize("rule", MOMENT_RULES)
@given(data=st.data())
def test_moment_rules_have_the_bits_of_the_cpu(
    rule: str, dtype: type, data: st.DataObject
) -> None:
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
