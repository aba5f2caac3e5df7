"""The kernels of every instruction set against numpy, without torch (see `make sanitize`)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from .. import strategies
from . import harness

kernels = harness.load()

isas = pytest.mark.parametrize("isa", kernels.isas())
float_types = pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even, as uint16 bits."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def count_votes(grads: np.ndarray) -> np.ndarray:
    return np.count_nonzero(grads > 0, axis=0) - np.count_nonzero(grads < 0, axis=0)


class Format(NamedTuple):
    """What rounding to a type may cost: relative step, absolute step, largest value."""

    eps: float
    tiny: float
    largest: float


FORMATS = {
    np.float16: Format(2.0**-10, 2.0**-24, 65504.0),
    np.uint16: Format(2.0**-7, 2.0**-133, float.fromhex("0x1.fep127")),  # bfloat16
    np.float32: Format(2.0**-23, 2.0**-149, float(np.finfo(np.float32).max)),
    np.float64: Format(2.0**-52, 5e-324, float(np.finfo(np.float64).max)),
}


def assert_close(out: np.ndarray, grads: np.ndarray, mask: np.ndarray, to: Format) -> None:
    """Compare with the mean in extended precision; ``grads`` and ``out`` are exact in float64."""
    wide = grads.astype(np.longdouble)
    sums = FORMATS[np.float64 if grads.dtype == np.float64 else np.float32]
    with np.errstate(all="ignore"):
        expected = mask * wide.mean(axis=0)
        size = np.abs(wide).mean(axis=0)
        # Where a sum leaves the range of its type, infinity (NaN under the mask) is right.
        overflows = ~(size * len(grads) < 0.99 * sums.largest) & (len(grads) > 1)
        overflows |= np.abs(expected) > to.largest
    hidden = ~np.isfinite(wide).all(axis=0)
    assert not np.isfinite(out[hidden]).any(), "a non-finite value was hidden"
    with np.errstate(all="ignore"):
        near = np.abs(out - expected) <= np.abs(expected) / 100
    assert (~np.isfinite(out) | near)[~hidden & overflows].all()
    check = ~hidden & ~overflows
    error = np.abs(out[check] - expected[check])
    # 4 rows at a time, 16 such sums to a group, and the groups in float64.
    rounding = (3 + 15) * sums.eps + len(grads) / 64 * FORMATS[np.float64].eps
    bound = rounding * size[check] + to.eps * np.abs(expected[check]) + to.tiny
    assert (error <= bound).all(), (error - bound).max()


@isas
@float_types
@given(data=st.data())
def test_reduce_matches_numpy(isa: str, dtype: type, data: st.DataObject) -> None:
    grads = data.draw(strategies.stacked(dtype))
    environments, columns = grads.shape
    tau = data.draw(st.one_of(strategies.taus, strategies.tie_taus(environments)))
    splits = sorted(data.draw(st.lists(st.integers(0, columns), max_size=3)))
    threshold = kernels.vote_threshold(tau, environments)
    mask = np.abs(count_votes(grads)) >= threshold

    out, kept = kernels.masked_mean(isa, grads, threshold, splits=splits)
    assert out.dtype == dtype
    assert kept == mask.sum()
    assert_close(out.astype(np.float64), grads, mask, FORMATS[dtype])

    flags, kept = kernels.masked_mean(isa, grads, threshold, output="mask", splits=splits)
    assert kept == mask.sum()
    np.testing.assert_array_equal(flags, mask)


@isas
@given(data=st.data())
def test_reduce_bfloat16_matches_numpy(isa: str, data: st.DataObject) -> None:
    bits = to_bfloat16(data.draw(strategies.stacked(np.float32)))
    grads = from_bfloat16(bits)
    threshold = kernels.vote_threshold(data.draw(strategies.taus), len(grads))
    mask = np.abs(count_votes(grads)) >= threshold
    out, kept = kernels.masked_mean(isa, bits, threshold)
    assert out.dtype == np.uint16
    assert kept == mask.sum()
    assert_close(from_bfloat16(out).astype(np.float64), grads, mask, FORMATS[np.uint16])
    wide, _ = kernels.masked_mean(isa, bits, threshold, output="masked_mean_wide")
    assert wide.dtype == np.float32
    assert_close(wide.astype(np.float64), grads, mask, FORMATS[np.float32])
    finite = np.isfinite(wide)
    np.testing.assert_array_equal(out[finite], to_bfloat16(wide)[finite])  # rounded once


@given(grads=strategies.stacked(np.float32), data=st.data())
def test_instruction_sets_and_splits_give_the_same_bits(
    grads: np.ndarray, data: st.DataObject
) -> None:
    splits = sorted(data.draw(st.lists(st.integers(0, grads.shape[1]), max_size=4)))
    threshold = kernels.vote_threshold(data.draw(strategies.taus), len(grads))
    for array in (grads, grads.astype(np.float64), to_bfloat16(grads)):
        expected, _ = kernels.masked_mean("baseline", array, threshold)
        for isa in kernels.isas():
            out, _ = kernels.masked_mean(isa, array, threshold, splits=splits)
            assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize("columns", [16_383, 16_384, 16_385, 33_000])
@pytest.mark.parametrize("environments", [4, 5, 65])
def test_columns_about_the_edges_of_a_block(environments: int, columns: int) -> None:
    grads = np.random.default_rng(0).standard_normal((environments, columns)).astype(np.float32)
    threshold = kernels.vote_threshold(0.5, environments)
    mask = np.abs(count_votes(grads)) >= threshold
    expected, _ = kernels.masked_mean("baseline", grads, threshold)
    for isa in kernels.isas():
        out, kept = kernels.masked_mean(isa, grads, threshold)
        assert kept == mask.sum()
        assert out.tobytes() == expected.tobytes()
        assert_close(out.astype(np.float64), grads, mask, FORMATS[np.float32])


@isas
@pytest.mark.parametrize("stride", [0, 7, 64, 1000])
def test_rows_may_lie_anywhere(isa: str, stride: int) -> None:
    rng = np.random.default_rng(0)
    columns = 7
    memory = rng.standard_normal(8 * 1000 + columns).astype(np.float32)
    grads = np.lib.stride_tricks.as_strided(memory, (8, columns), (4 * stride, 4))
    out, _ = kernels.masked_mean(isa, grads, 4)
    expected, _ = kernels.masked_mean(isa, np.ascontiguousarray(grads), 4)
    np.testing.assert_array_equal(out, expected)


@isas
def test_every_half_value_is_widened_and_rounded_exactly(isa: str) -> None:
    every = np.arange(2**16, dtype=np.uint16)
    half = every.view(np.float16)[None]
    wide, _ = kernels.masked_mean(isa, half, 0, output="masked_mean_wide")
    np.testing.assert_array_equal(wide, half[0].astype(np.float32))
    back = kernels.scale(isa, wide, 1.0, half)
    np.testing.assert_array_equal(back, half[0])
    brain, _ = kernels.masked_mean(isa, every[None], 0, output="masked_mean_wide")
    np.testing.assert_array_equal(brain, from_bfloat16(every))


@isas
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=200))
def test_rounding_to_16_bits_is_to_nearest_even(isa: str, values: list[float]) -> None:
    wide = np.array(values, np.float32)
    # Halfway cases too: the midpoint of two neighbouring halves is exact in float32.
    with np.errstate(over="ignore", invalid="ignore"):
        halves = wide.astype(np.float16)
        upper = np.nextafter(halves, np.float16(np.inf)).astype(np.float32)
        middle = (halves.astype(np.float32) + upper) / 2
        wide = np.concatenate([wide, middle])
        expected = wide.astype(np.float16)
    np.testing.assert_array_equal(kernels.scale(isa, wide, 1.0, expected), expected)
    brain = kernels.scale(isa, wide, 1.0, np.zeros(1, np.uint16))
    np.testing.assert_array_equal(from_bfloat16(brain), from_bfloat16(to_bfloat16(wide)))


@isas
def test_scale_multiplies_in_float64(isa: str) -> None:
    values = np.array([1.0, -3.0, 1e-30, np.nan, np.inf], np.float32)
    factor = 1 / 3 + 1e-9
    expected = (values.astype(np.float64) * factor).astype(np.float32)
    np.testing.assert_array_equal(kernels.scale(isa, values, factor, values), expected)


def test_vote_threshold_is_exact_for_every_tie() -> None:
    for environments in [*range(1, 400), 1000, 4097, 65536, 2**31 - 1]:
        for votes in {
            0,
            1,
            2,
            3,
            environments // 3,
            environments // 2,
            environments - 1,
            environments,
        }:
            if votes <= environments:
                assert kernels.vote_threshold(votes / environments, environments) == votes
    for environments in (1, 2, 10, 127):
        for tau in np.linspace(0, 1, 97):
            expected = max(0, math.ceil(tau * environments - 1e-6))
            assert kernels.vote_threshold(tau, environments) == expected


def test_inverse_density() -> None:
    assert kernels.inverse_density(0, 10) == 1e10
    assert kernels.inverse_density(5, 10) == pytest.approx(2.0, rel=1e-9)
    assert kernels.inverse_density(2**31, 2**33) == pytest.approx(4.0, rel=1e-9)


def test_harness_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="isa"):
        kernels.masked_mean("sse9", np.zeros((2, 3), np.float32), 1)
    with pytest.raises(ValueError, match="grads: expected float16"):
        kernels.masked_mean("baseline", np.zeros((2, 3), np.int64), 1)
    with pytest.raises(ValueError, match="contiguous rows"):
        kernels.masked_mean("baseline", np.zeros((3, 2), np.float32).T, 1)
