"""Histograms of votes: the kernel on every instruction set, and the CUDA body, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.native import harness
from tests.native.arrays import DTYPES, placed, stored
from tests.strategies import stacked

native = harness.load()
by_isa = pytest.mark.parametrize("isa", native.isas())
VOTE_TYPES = (np.int8, np.int16, np.int32)


@st.composite
def moments(draw: st.DrawFn, float_type: type) -> tuple[NDArray, NDArray, int]:
    """Sums, votes and how many environments they may be of."""
    grads = draw(stacked(float_type))
    environments = len(grads)
    with np.errstate(all="ignore"):
        sums = grads.sum(0, dtype=float_type)
    votes = (grads > 0).sum(0) - (grads < 0).sum(0)
    wide_enough = [t for t in VOTE_TYPES if environments <= np.iinfo(t).max]
    return sums, votes.astype(draw(st.sampled_from(wide_enough))), environments


def expected(sums: NDArray, votes: NDArray, environments: int) -> tuple[NDArray, NDArray]:
    agreement = np.abs(votes.astype(np.int64))
    squares = np.zeros(environments + 1)
    with np.errstate(all="ignore"):
        np.add.at(squares, agreement, sums.astype(np.float64) ** 2)
    return np.bincount(agreement, minlength=environments + 1), squares


def close(one: NDArray, other: NDArray) -> bool:
    return np.allclose(one, other, rtol=1e-12, atol=0, equal_nan=True)


@by_isa
@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("float_type", [np.float32, np.float64])
def test_counts_and_squares(isa: str, lanes: bool, float_type: type) -> None:
    @given(moments(float_type))
    def check(drawn: tuple[NDArray, NDArray, int]) -> None:
        sums, votes, environments = drawn
        counts, squares, possible = native.vote_histogram(isa, sums, votes, environments, lanes)
        wanted = expected(sums, votes, environments)
        assert possible
        assert counts.tolist() == wanted[0].tolist()
        assert close(squares, wanted[1])

    check()


@pytest.mark.parametrize("float_type", [np.float32, np.float64])
def test_every_instruction_set_gives_the_same_bits(float_type: type) -> None:
    @given(moments(float_type), st.booleans())
    def check(drawn: tuple[NDArray, NDArray, int], lanes: bool) -> None:
        sums, votes, environments = drawn
        found = {
            np.nan_to_num(
                native.vote_histogram(isa, sums, votes, environments, lanes)[1], nan=-1.0
            ).tobytes()
            for isa in native.isas()
        }
        assert len(found) == 1

    check()


@by_isa
@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("vote", [4, -4, -(2**31), 2**31 - 1])
def test_votes_that_cannot_be_are_seen(isa: str, lanes: bool, vote: int) -> None:
    votes = np.zeros(1000, np.int32)
    votes[700] = vote
    counts, _, possible = native.vote_histogram(isa, np.ones(1000, np.float32), votes, 3, lanes)
    assert not possible
    assert counts.sum() < 1000


def test_the_cuda_body_on_lists() -> None:
    @given(st.lists(moments(np.float32) | moments(np.float64), min_size=1, max_size=6), st.data())
    def check(drawn: list[tuple[NDArray, NDArray, int]], data: st.DataObject) -> None:
        environments = max(most for _, _, most in drawn)
        skips = data.draw(st.lists(st.sampled_from([0, 0, 1, 3]), min_size=6, max_size=6))
        sums = [placed(one, skip) for (one, _, _), skip in zip(drawn, skips, strict=False)]
        votes = [placed(one, skip) for (_, one, _), skip in zip(drawn, skips, strict=False)]
        counts, squares = native.cuda_vote_histograms(sums, votes, environments)
        for row, (one, vote, _) in enumerate(drawn):
            wanted = expected(one, vote, environments)
            assert counts[row].tolist() == wanted[0].tolist()
            assert close(squares[row], wanted[1])

    check()


@pytest.mark.parametrize("bins", [1024, 1025, 40, 33, 32, 31])
def test_the_cuda_body_with_and_without_room_in_shared_memory(bins: int) -> None:
    rng = np.random.default_rng(bins)
    sums = rng.standard_normal(20_000).astype(np.float32)
    votes = rng.integers(1 - bins, bins, 20_000).astype(np.int32)
    counts, squares = native.cuda_vote_histograms([sums], [votes], bins - 1)
    wanted = expected(sums, votes, bins - 1)
    assert counts[0].tolist() == wanted[0].tolist()
    assert close(squares[0], wanted[1])


def test_the_cuda_body_leaves_out_what_cannot_be() -> None:
    for bins in (5, 2000):
        votes = np.array([0, bins, -bins, bins - 1], np.int32)
        counts, squares = native.cuda_vote_histograms([np.ones(4, np.float32)], [votes], bins - 1)
        assert counts.sum() == 2
        assert squares.sum() == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cuda_bodies_on_stacked_gradients(dtype: type) -> None:
    @given(stacked(np.float32 if dtype is np.uint16 else dtype, finite=True))
    def check(values: NDArray) -> None:
        grads = stored(values, dtype)
        wide = grads.astype(np.float64)
        if dtype is np.uint16:
            wide = (grads.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        counts, squares = native.cuda_vote_histogram(grads)
        votes = (wide > 0).sum(0) - (wide < 0).sum(0)
        wanted = expected(wide.sum(0), votes, len(grads))
        assert counts.tolist() == wanted[0].tolist()
        size = (np.abs(wide).sum(0) ** 2).sum()
        assert np.allclose(squares, wanted[1], rtol=0, atol=size * len(grads) * 1e-6)

    check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cuda_bodies_on_more_columns_than_fit_in_scratch(dtype: type) -> None:
    columns = (1 << 20) + 5000
    values = np.ones((2, columns), np.float32)
    values[1, -4000:] = -1  # votes differ behind the first part only
    counts, squares = native.cuda_vote_histogram(stored(values, dtype))
    assert counts.tolist() == [4000, 0, columns - 4000]
    assert squares.tolist() == [0, 0, 4.0 * (columns - 4000)]
