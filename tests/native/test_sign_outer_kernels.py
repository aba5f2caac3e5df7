"""Votes of environments of one row each against numpy, for every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ..strategies import stacked
from .test_masked_mean_kernels import isas, kernels, to_bfloat16

# About the edges of groups, of blocks, of tiles and of panels.
environments = st.one_of(
    st.integers(1, 20), st.sampled_from([123, 124, 125, 127, 128, 248, 249, 300])
)
widths = st.one_of(st.integers(1, 20), st.sampled_from([31, 33, 63, 64, 65, 128, 200, 257, 320]))


def products_of_signs(activations: np.ndarray, grad_outputs: np.ndarray) -> np.ndarray:
    signs = [(x > 0).astype(np.int64) - (x < 0) for x in (grad_outputs, activations)]
    return signs[0].T @ signs[1]


@isas
@pytest.mark.parametrize("dtype", [np.float16, np.uint16, np.float32, np.float64])
@given(data=st.data())
def test_votes_are_sums_of_products_of_signs(isa: str, dtype: type, data: st.DataObject) -> None:
    drawn = np.float32 if dtype == np.uint16 else dtype
    count = st.just(data.draw(environments))
    operands = []
    for _ in range(2):
        values = data.draw(stacked(drawn, environments=count, columns=widths))
        if data.draw(st.booleans()):  # not one of them is zero
            values = np.where((values == 0) | np.isnan(values), drawn(-1), values)
        if dtype == np.uint16:
            values = to_bfloat16(values)
        if data.draw(st.booleans()):  # neither rows nor columns lie side by side
            holes = np.zeros((values.shape[0] * 2, values.shape[1] * 3), values.dtype)
            holes[::2, ::3] = values
            values = holes[::2, ::3]
        operands.append(values)
    exact = [
        (x.astype(np.uint32) << 16).view(np.float32) if dtype == np.uint16 else x for x in operands
    ]
    expected = products_of_signs(*exact)

    types = [np.int16, np.int32, *([np.int8] if len(exact[0]) < 128 else [])]
    votes_type = data.draw(st.sampled_from(types))
    around = np.full((expected.shape[0], expected.shape[1] + 5), 3, votes_type)
    votes = around[:, 2:-3]
    kernels.sign_outer(isa, *operands, votes, first=True, panels=data.draw(st.integers(1, 6)))
    np.testing.assert_array_equal(votes, expected)
    assert (around[:, :2] == 3).all()
    assert (around[:, -3:] == 3).all()
    if votes_type != np.int8:
        kernels.sign_outer(isa, *operands, votes, first=False)
        np.testing.assert_array_equal(votes, 2 * expected)


@isas
@pytest.mark.parametrize("votes_type", [np.int8, np.int16, np.int32])
def test_unanimous_votes_do_not_overflow(isa: str, votes_type: type) -> None:
    count = 127 if votes_type == np.int8 else 1000
    votes = np.empty((70, 130), votes_type)
    a, d = np.full((count, 130), np.inf, np.float32), np.full((count, 70), -1e-45, np.float32)
    kernels.sign_outer(isa, a, d, votes)
    assert (votes == -count).all()
