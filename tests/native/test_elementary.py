"""Logarithm, exponential and hyperbolic tangent of csrc/math against numpy's long double."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from . import harness

kernels = harness.load()

functions = pytest.mark.parametrize("function", ["log", "exp", "tanh"])
float_types = pytest.mark.parametrize("dtype", [np.float32, np.float64])

# Ulps. float32 takes exp and tanh through float64: hardly more than the last rounding is left.
LIMITS = {
    ("log", np.float32): 1.0,
    ("exp", np.float32): 0.501,
    ("tanh", np.float32): 0.501,
    ("log", np.float64): 1.5,
    ("exp", np.float64): 1.5,
    ("tanh", np.float64): 3.0,
}


def assert_accurate(function: str, values: np.ndarray) -> None:
    """Compare with extended precision; beyond the range of the type, exactly."""
    kind = np.finfo(values.dtype)
    out = kernels.elementary(function, values)
    assert out.dtype == values.dtype
    assert out.shape == values.shape
    with np.errstate(all="ignore"):
        expected = getattr(np, function)(values.astype(np.longdouble))
        rounded = expected.astype(values.dtype)
    counts = np.isfinite(rounded) & np.isfinite(out)
    np.testing.assert_array_equal(out[~counts], rounded[~counts])
    # Not np.spacing(rounded): just below a power of two that is the spacing of the next binade.
    exponent = np.maximum(np.frexp(expected[counts])[1], kind.minexp + 1)
    ulp = np.ldexp(np.longdouble(1), exponent - kind.nmant - 1)
    error = np.abs(out[counts] - expected[counts]) / ulp
    if error.size:
        worst = error.argmax()
        limit = LIMITS[function, values.dtype.type]
        assert error[worst] <= limit, f"{error[worst]} ulp at {float(values[counts][worst]).hex()}"


def dense(function: str, dtype: type) -> np.ndarray:
    """Every binade of either sign, and more where the result is neither clamped nor trivial."""
    bits = {np.float32: np.uint32, np.float64: np.uint64}[dtype]
    rng = np.random.default_rng(0)
    everywhere = rng.integers(0, np.iinfo(bits).max, 200_000, bits, endpoint=True).view(dtype)
    low, high = {"log": (1e-10, 3.0), "exp": (-750.0, 715.0), "tanh": (-20.0, 20.0)}[function]
    middle = [rng.uniform(low, high, 200_000), rng.uniform(-1, 1, 100_000)]
    near_one = 1 + np.ldexp(rng.uniform(-1, 1, 50_000), rng.integers(-50, 0, 50_000))
    tiny = rng.integers(1, 1 << np.finfo(dtype).nmant, 10_000).astype(bits).view(dtype)
    return np.concatenate([everywhere, *(x.astype(dtype) for x in [*middle, near_one]), tiny])


@functions
@float_types
def test_error_over_the_whole_range(function: str, dtype: type) -> None:
    assert_accurate(function, dense(function, dtype))


@functions
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_error_float32(function: str, values: list[float]) -> None:
    assert_accurate(function, np.array(values, np.float32))


@functions
@given(
    values=st.lists(
        st.one_of(st.floats(), st.floats(-750, 715), st.floats(-1, 1), st.floats(0.5, 2)),
        min_size=1,
        max_size=50,
    )
)
def test_error_float64(function: str, values: list[float]) -> None:
    assert_accurate(function, np.array(values, np.float64))


SPECIAL = {
    "log": (
        [0.0, -0.0, 1.0, np.inf, -np.inf, -1.0, -1e-40, np.nan],
        [-np.inf, -np.inf, 0.0, np.inf, np.nan, np.nan, np.nan, np.nan],
    ),
    "exp": ([0.0, -0.0, np.inf, -np.inf, np.nan], [1.0, 1.0, np.inf, 0.0, np.nan]),
    "tanh": ([0.0, -0.0, np.inf, -np.inf, np.nan], [0.0, -0.0, 1.0, -1.0, np.nan]),
}


@functions
@float_types
def test_special_values(function: str, dtype: type) -> None:
    values, expected = (np.array(side, dtype) for side in SPECIAL[function])
    out = kernels.elementary(function, values)
    np.testing.assert_array_equal(out, expected)
    kept = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(out[kept]), np.signbit(expected[kept]))


@float_types
def test_log_of_powers_of_two(dtype: type) -> None:
    kind = np.finfo(dtype)
    exponents = np.arange(kind.minexp - kind.nmant, kind.maxexp)
    out = kernels.elementary("log", np.ldexp(dtype(1), exponents))
    assert (np.diff(out) > 0).all()
    exact = exponents * np.log(np.longdouble(2))
    np.testing.assert_array_equal(out, exact.astype(dtype))


def test_exp_overflows_and_underflows_where_it_should() -> None:
    last = np.log(np.finfo(np.float64).max)
    first = -745.1332191019411  # the least argument with a result of at least half a subnormal
    values = np.array([-1e308, -1e4, -746.0, np.nextafter(first, -np.inf), first, last])
    out = kernels.elementary("exp", values)
    np.testing.assert_array_equal(out[:5], [0.0, 0.0, 0.0, 0.0, 5e-324])
    assert np.isfinite(out[5])
    above = np.array([np.nextafter(last, np.inf), 710.0, 711.0, 1e4, 1e308])
    assert np.isposinf(kernels.elementary("exp", above)).all()


@pytest.mark.parametrize(("function", "ends"), [("exp", (-746.0, 710.0)), ("tanh", (-20.0, 20.0))])
def test_clamps_are_monotone(function: str, ends: tuple[float, float]) -> None:
    for end in ends:
        values = end + np.linspace(-0.5, 0.5, 4001)
        out = kernels.elementary(function, values)
        assert (out[1:] >= out[:-1]).all()


@given(values=st.lists(st.floats(allow_nan=False), min_size=1, max_size=50))
def test_tanh_is_odd_and_bounded(values: list[float]) -> None:
    array = np.array(values)
    out = kernels.elementary("tanh", array)
    assert (np.abs(out) <= 1).all()
    assert (-out).tobytes() == kernels.elementary("tanh", -array).tobytes()


@float_types
def test_tanh_of_tiny_values_is_the_value(dtype: type) -> None:
    kind = np.finfo(dtype)
    tiny = np.ldexp(dtype(1.25), np.arange(kind.minexp - kind.nmant, -kind.nmant))
    np.testing.assert_array_equal(kernels.elementary("tanh", tiny), tiny)


def test_harness_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="function: expected log"):
        kernels.elementary("sin", np.ones(1))
    with pytest.raises(ValueError, match="1 dim"):
        kernels.elementary("log", np.ones((1, 1)))
    with pytest.raises(ValueError, match="array: expected float32"):
        kernels.elementary("log", np.ones(1, np.int64))
