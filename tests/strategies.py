"""What the property tests draw: shapes, values, thresholds, as numpy arrays.

Values matter as much as shapes: zeros of both signs, subnormals, huge numbers, infinities, NaN, and
exact ties at the threshold.
"""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

# Counts about the edges of the kernel's row groups and column blocks.
environment_counts = st.one_of(
    st.integers(1, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 68, 127, 128, 129, 192, 300])
)
column_counts = st.one_of(
    st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 255, 511, 512, 513, 1025, 4097])
)

_FINITE = [0.0, -0.0, 1.0, -1.0, 0.5, -3.25, 1e-3, -1e-3, 1e-7, -6e-8, 300.0, -300.0]
_SUBNORMAL = {
    np.float16: [6e-8, -6e-8, 5e-5, -5e-5],
    np.float32: [1e-45, -1e-45, 1e-39, -1e-39],
    np.float64: [5e-324, -5e-324, 1e-310, -1e-310],
}
_HUGE = {
    np.float16: [65504.0, -65504.0],
    np.float32: [3.4e38, -3.4e38, 1e30],
    np.float64: [1.7e308, -1.7e308, 1e300],
}
_NON_FINITE = [np.inf, -np.inf, np.nan]

taus = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 0.1, 0.6, 0.8, 1 / 3]), st.floats(0, 1))


def tie_taus(environments: int) -> st.SearchStrategy[float]:
    """Thresholds that some vote count meets exactly."""
    return st.integers(0, environments).map(lambda votes: votes / environments)


@st.composite
def stacked(
    draw: st.DrawFn,
    dtype: type = np.float32,
    finite: bool = False,
    environments: st.SearchStrategy[int] = environment_counts,
    columns: st.SearchStrategy[int] = column_counts,
) -> np.ndarray:
    """Stacked gradients ``[d, columns]``: noise, or values out of a drawn palette, or both."""
    shape = (draw(environments), draw(columns))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pool = _FINITE + _SUBNORMAL[dtype]
    if not finite:
        pool = pool + _HUGE[dtype] + _NON_FINITE
    palette = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=6))
    with np.errstate(over="ignore"):
        chosen = rng.choice(np.array(palette), shape).astype(dtype)
        noise = rng.standard_normal(shape).astype(dtype)
    share = draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    return np.where(rng.random(shape) < share, chosen, noise)
