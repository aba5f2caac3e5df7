"""vote_histogram and vote_histograms against the reference, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import andmask_ext as am
from andmask_ext import reference
from tests.conftest import cuda_kernels
from tests.strategies import stacked

from .test_masked_mean import LAYOUTS, dtypes

ops = torch.ops.andmask
NUMPY = {torch.float16: np.float16, torch.float64: np.float64}


def assert_same(result: tuple[Tensor, Tensor], grads: Tensor) -> None:
    counts, squares = reference.vote_histogram(grads)
    assert result[0].dtype == torch.int64
    assert result[1].dtype == torch.float64
    assert torch.equal(result[0], counts)
    size = (grads.double().abs().sum(0).square()).sum()
    if torch.isfinite(squares).all() and size < 1e38:
        rounding = 1e-12 if grads.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(
            result[1], squares, rtol=0, atol=float(size) * len(grads) * rounding
        )
    else:
        ordinary = torch.isfinite(result[1])
        assert not (ordinary & torch.isnan(squares)).any()


@dtypes
def test_against_the_reference(dtype: torch.dtype) -> None:
    @given(stacked(NUMPY.get(dtype, np.float32)))
    def check(values: np.ndarray) -> None:
        grads = torch.tensor(values).to(dtype)
        assert_same(am.ops.vote_histogram(grads), grads)
        moments = am.Moments([grads[0]])
        moments.add_stacked([grads])
        counts, squares = ops._vote_histograms(moments.sum, moments.votes, len(grads))
        assert counts.shape == squares.shape == (1, len(grads) + 1)
        assert torch.equal(counts[0], reference.vote_histogram(grads)[0])
        total = moments.sum[0].double().square().sum()
        if torch.isfinite(total):
            torch.testing.assert_close(squares.sum(), total, rtol=1e-12, atol=0)

    check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    grads = LAYOUTS[layout](torch.randn(5, 6, 7)).detach()
    assert_same(am.ops.vote_histogram(grads), grads)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_moments_in_other_layouts(memory: torch.memory_format) -> None:
    sums = [torch.randn(2, 3, 4, 5).to(memory_format=memory), torch.randn(7, 5).t()]
    votes = [torch.randint(-4, 5, (2, 3, 4, 5), dtype=torch.int8),
             torch.randint(-4, 5, (5, 7), dtype=torch.int16)]  # fmt: skip
    counts, squares = ops._vote_histograms(sums, votes, 4)
    for row, (one, vote) in enumerate(zip(sums, votes, strict=True)):
        for k in range(5):
            there = vote.abs() == k
            assert counts[row, k] == there.sum()
            assert squares[row, k].item() == pytest.approx(
                one[there].double().square().sum().item(), rel=1e-12
            )


def test_empty_tensors() -> None:
    counts, squares = am.ops.vote_histogram(torch.zeros(3, 0, 5))
    assert counts.tolist() == [0, 0, 0, 0]
    assert squares.tolist() == [0, 0, 0, 0]
    counts, _ = am.ops.vote_histogram(torch.tensor([1.0, -2.0, 3.0]))  # one coordinate
    assert counts.tolist() == [0, 1, 0, 0]
    counts, _ = ops._vote_histograms(
        [torch.zeros(0), torch.ones(())],
        [torch.zeros(0, dtype=torch.int8), torch.ones((), dtype=torch.int8)], 2,
    )  # fmt: skip
    assert counts.tolist() == [[0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("environments", [600, 40_000])
def test_very_many_environments(environments: int) -> None:
    grads = torch.randn(environments, 3).repeat(1, 2)
    assert_same(am.ops.vote_histogram(grads), grads)


@pytest.mark.cpu_only
@pytest.mark.skipif(cuda_kernels(), reason="about the CPU's kernels")
def test_the_number_of_threads_does_not_matter() -> None:
    grads = torch.randn(5, 300_001)
    sums, votes = [grads.sum(0), grads[:, :7].sum(0)], [
        grads.sign().sum(0).to(torch.int8), torch.zeros(7, dtype=torch.int8)
    ]  # fmt: skip
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((*ops.vote_histogram(grads), *ops._vote_histograms(sums, votes, 5)))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)
    assert_same(results[0][:2], grads)


def test_results_never_require_grad_and_compile() -> None:
    grads = torch.randn(4, 10, requires_grad=True)
    assert not any(one.requires_grad for one in am.ops.vote_histogram(grads))
    torch.library.opcheck(ops.vote_histogram.default, (grads,))
    torch.library.opcheck(
        ops._vote_histograms.default,
        ([torch.randn(3), torch.randn(2, 2)],
         [torch.ones(3, dtype=torch.int8), torch.ones(2, 2, dtype=torch.int16)], 4),
    )  # fmt: skip


def one_of_each() -> tuple[list[Tensor], list[Tensor]]:
    return [torch.randn(3)], [torch.ones(3, dtype=torch.int8)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, v: (s, [], 2), "expected votes of 1 tensors, as sum has, but got 0"),
        (lambda s, v: (s, v, 0), r"expected count in \[1, 2\^31 - 1\], but got 0"),
        (lambda s, v: (s, v, 128), r"expected votes\[0\] wide enough for 128 environments"),
        (lambda s, v: ([s[0].half()], v, 2), r"expected sum\[0\] of dtype float32 or float64"),
        (lambda s, v: (s, [v[0].long()], 2), r"expected votes\[0\] of dtype int8, int16 or int32"),
        (lambda s, v: (s, [v[0][:2]], 2), r"expected votes\[0\] of shape \(3\), as sum has"),
    ],
)
def test_what_is_refused(change, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops._vote_histograms(*change(*one_of_each()))


@pytest.mark.cpu_only
@pytest.mark.skipif(cuda_kernels(), reason="CUDA does not ask the host")
def test_votes_that_cannot_be() -> None:
    sums, votes = one_of_each()
    votes[0][1] = 3
    with pytest.raises(RuntimeError, match=r"expected \|votes\| of at most count = 2, but got"):
        ops._vote_histograms(sums, votes, 2)


def test_errors_of_the_wrapper() -> None:
    with pytest.raises(TypeError, match="grads: expected a Tensor, but got list"):
        am.ops.vote_histogram([1.0])
    with pytest.raises(ValueError, match="grads: expected at least 1 environment"):
        am.ops.vote_histogram(torch.zeros(0, 3))
