"""Sums of outer products against numpy in float64, for every instruction set, and for CUDA."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from .arrays import empty_moments, same_bits
from .test_masked_mean_kernels import FORMATS, from_bfloat16, kernels, to_bfloat16

# "cuda": the bodies of its kernels, run thread by thread.
KERNELS = [*kernels.isas(), "cuda"]
isas = pytest.mark.parametrize("isa", KERNELS)
dtypes = st.sampled_from([np.float16, np.uint16, np.float32, np.float64])  # uint16: bfloat16
# About the edges of tiles, vectors and panels.
widths = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 48, 63, 64, 65, 100, 129]))
POINT = [1, 1, 0, 1]  # taps, step, padding, dilation


def stored(values: np.ndarray, dtype: type) -> np.ndarray:
    return to_bfloat16(values.astype(np.float32)) if dtype == np.uint16 else values.astype(dtype)


def exact(values: np.ndarray) -> np.ndarray:
    wide = from_bfloat16(values) if values.dtype == np.uint16 else values
    return wide.astype(np.float64)


def laid_out(values: np.ndarray, permutation: list[int], holes: bool) -> np.ndarray:
    """Return the same array with its dims in memory in another order, and perhaps apart."""
    memory = np.ascontiguousarray(values.transpose(permutation))
    if holes:
        wide = np.zeros([2 * size + 1 for size in memory.shape], memory.dtype)
        view = wide[tuple(slice(0, 2 * size, 2) for size in memory.shape)]
        view[...] = memory
        memory = view
    return memory.transpose(np.argsort(permutation))


def per_example(
    activations: np.ndarray, grad_outputs: np.ndarray, window: list[list[int]], groups: int
) -> np.ndarray:
    """Weight gradients [examples, outputs, channels, *taps]."""
    padded = np.pad(activations, [(0, 0), (0, 0), *((w[2], w[2]) for w in window)])
    examples, outputs = grad_outputs.shape[:2]
    positions = grad_outputs.shape[2:]
    channels = activations.shape[1] // groups
    weights = np.zeros((examples, outputs, channels, *(w[0] for w in window)))
    d = grad_outputs.reshape(examples, groups, outputs // groups, -1)
    for tap in itertools.product(*(range(w[0]) for w in window)):
        seen = tuple(
            slice(k * w[3], k * w[3] + (size - 1) * w[1] + 1, w[1])
            for k, w, size in zip(tap, window, positions, strict=True)
        )
        a = padded[(slice(None), slice(None), *seen)].reshape(examples, groups, channels, -1)
        product = np.einsum("egop,egcp->egoc", d, a)
        weights[(..., *tap)] = product.reshape(examples, outputs, channels)
    return weights


def per_environment(
    examples: np.ndarray, offsets: list[int], order: list[int] | None
) -> np.ndarray:
    chosen = examples if order is None else examples[order]
    return np.stack([chosen[a:b].sum(0) for a, b in itertools.pairwise(offsets)])


def assert_moments(
    found: SimpleNamespace, weights: np.ndarray, sizes: np.ndarray, rows: int
) -> None:
    """``sizes`` are sums of the magnitudes of what ``weights`` sum, per environment."""
    eps = np.finfo(found.sum.dtype).eps
    unsure = (np.abs(weights) <= min(1e-6, 4 * eps * rows) * sizes).sum(0)
    wrong = np.abs(found.votes.astype(int) - np.sign(weights).sum(0))
    assert (wrong <= 2 * unsure).all()
    error = np.abs(found.sum - weights.sum(0))
    assert (error <= 2 * (rows**0.5 + len(weights)) * eps * sizes.sum(0) + 1e-30).all()


@st.composite
def environments(draw: st.DrawFn, examples: int) -> tuple[list[int], list[int] | None]:
    """Draw offsets and order: ragged, empty ones included."""
    cuts = draw(st.lists(st.integers(0, examples), max_size=6))
    offsets = [0, *sorted(cuts), examples]
    if draw(st.booleans()):
        offsets = list(range(examples + 1))
    order = draw(st.one_of(st.none(), st.permutations(range(examples))))
    return offsets, order


def check_against_numpy(
    data: st.DataObject,
    isa: str,
    dtype: type,
    a_shape: tuple[int, ...],
    d_shape: tuple[int, ...],
    window: list[list[int]],
    groups: int = 1,
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    dims = range(len(a_shape))
    arrays = []
    for shape in (a_shape, d_shape):
        values = stored(rng.standard_normal(shape) * (rng.random(shape) < 0.8), dtype)
        permutation = data.draw(
            st.sampled_from([[*dims], [0, *dims[2:], 1], [*dims[1:], 0], [*reversed(dims)]])
        )
        arrays.append(laid_out(values, permutation, data.draw(st.booleans())))
    a, d = arrays
    offsets, order = data.draw(environments(a_shape[0]))
    shape = (d_shape[1], a_shape[1] // groups, *(w[0] for w in window))
    last = data.draw(st.booleans())  # moments in channels-last memory
    found = empty_moments((shape[0], *shape[2:], shape[1]) if last else shape, dtype)
    if last:
        found = SimpleNamespace(**{k: np.moveaxis(v, -1, 1) for k, v in vars(found).items()})
    # In two calls, the second of which adds.
    first = data.draw(st.integers(0, len(offsets) - 2))
    threads = data.draw(st.sampled_from([1, 2, 3, 16]))
    for begin, end in ((0, first), (first, len(offsets) - 1)):
        if begin == end:
            continue
        kernels.outer(
            isa,
            a,
            d,
            offsets[begin : end + 1],
            found.sum,
            found.votes,
            window=window,
            order=order,
            count=begin,
            groups=groups,
            threads=threads,
        )
    weights = per_environment(per_example(exact(a), exact(d), window, groups), offsets, order)
    sizes = np.abs(exact(a)), np.abs(exact(d))
    sizes = per_environment(per_example(*sizes, window, groups), offsets, order)
    assert_moments(found, weights, sizes, a_shape[0] * int(np.prod(d_shape[2:])))


@given(data=st.data(), isa=st.sampled_from(KERNELS), dtype=dtypes)
def test_linear_layers_match_numpy(isa: str, dtype: type, data: st.DataObject) -> None:
    examples = data.draw(st.one_of(st.integers(1, 20), st.sampled_from([127, 130, 300])))
    rows = data.draw(st.one_of(st.integers(1, 5), st.sampled_from([16, 31, 130, 257])))
    rows = min(rows, 3000 // examples + 1)
    inputs, outputs = data.draw(widths), data.draw(widths)
    a_shape, d_shape = (examples, inputs, rows), (examples, outputs, rows)
    check_against_numpy(data, isa, dtype, a_shape, d_shape, [POINT])


@given(data=st.data(), isa=st.sampled_from(KERNELS), dtype=dtypes)
def test_convolutions_match_numpy(isa: str, dtype: type, data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))
    groups = data.draw(st.sampled_from([1, 1, 2, 5, 20, 70]))
    few = groups > 5  # groups of one channel are taken lane by lane
    channels = groups * data.draw(st.sampled_from([1] if few else [1, 3, 7, 15, 16, 20, 64, 70]))
    outputs = groups * data.draw(st.sampled_from([1, 2] if few else [1, 2, 6, 13]))
    examples = data.draw(st.integers(1, 6))
    window, sizes, positions = [], [], []
    for axis in range(dims):
        taps = data.draw(st.integers(1, 3 if axis < 2 else 2))
        step, dilation = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
        padding = data.draw(st.integers(0, 2))
        least = max(1, (taps - 1) * dilation + 1 - 2 * padding)
        longest = [300, 20, 5][dims - 1]
        size = least + data.draw(st.integers(0, longest) | st.integers(0, 5))
        window.append([taps, step, padding, dilation])
        sizes.append(size)
        positions.append((size + 2 * padding - (taps - 1) * dilation - 1) // step + 1)
    a_shape, d_shape = (examples, channels, *sizes), (examples, outputs, *positions)
    check_against_numpy(data, isa, dtype, a_shape, d_shape, window, groups)


# ---- moments of every kind ----


@given(data=st.data(), isa=st.sampled_from(KERNELS), dtype=dtypes)
def test_all_moments_are_those_of_held_gradients(
    isa: str, dtype: type, data: st.DataObject
) -> None:
    """To the bit what ``accumulate`` makes of the weight gradients, environment by environment."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    examples = data.draw(st.integers(1, 9))
    outputs, channels, side = (
        data.draw(st.integers(1, 14)),
        data.draw(st.sampled_from([3, 20, 65])),
        data.draw(st.sampled_from([1, 4, 15])),
    )
    window = [[3, 1, 1, 1], POINT] if data.draw(st.booleans()) else [POINT, POINT]
    a = stored(rng.standard_normal((examples, channels, side, side)), dtype)
    d = stored(rng.standard_normal((examples, outputs, side, side)), dtype)
    offsets, order = data.draw(environments(examples))
    shape = (outputs, channels, window[0][0], 1)
    held = []
    for begin, end in itertools.pairwise(offsets):
        one = empty_moments(shape, dtype)
        # With squares, CUDA takes 16-bit products one by one too.
        extra = {"squares": one.squares} if isa == "cuda" else {}
        kernels.outer(isa, a, d, [begin, end], one.sum, window=window, order=order, **extra)
        held.append(one.sum.ravel())
    kinds = data.draw(st.sets(st.sampled_from(["votes", "squares", "logs"])))
    weights = [0.25, 1.0, 3.0] * len(held) if data.draw(st.booleans()) else []
    weights = weights[: len(held)]
    votes = data.draw(st.sampled_from([np.int8, np.int16, np.int32]))
    found, expected = empty_moments(shape, dtype, votes), empty_moments(shape, dtype, votes)
    for kind in ("votes", "squares", "logs"):
        if kind not in kinds:
            setattr(found, kind, None)
            setattr(expected, kind, None)
    flat = {k: None if v is None else v.reshape(-1) for k, v in vars(expected).items()}
    cpu = "baseline" if isa == "cuda" else isa
    kernels.accumulate(cpu, np.stack(held), 0, weights=weights, **flat)
    first = data.draw(st.integers(0, len(held) - 1))
    for begin, end in ((0, first), (first, len(held))):
        if begin == end:
            continue
        kernels.outer(
            isa,
            a,
            d,
            offsets[begin : end + 1],
            **vars(found),
            window=window,
            order=order,
            weights=weights[begin:end],
            count=begin,
            threads=data.draw(st.sampled_from([1, 5])),
        )
    for kind in kinds | {"sum"}:
        one, other = getattr(found, kind), getattr(expected, kind)
        if kind == "sum" and not kinds & {"squares", "logs"}:
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)  # two calls add two sums
        else:
            assert same_bits(one, other), kind


@isas
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("votes", [np.int8, np.int32])
@pytest.mark.parametrize(
    ("channels", "outputs", "groups"), [(70, 50, 1), (5, 4, 1), (40, 80, 40), (24, 24, 3)]
)
def test_bits_do_not_depend_on_threads(
    isa: str, dtype: type, votes: type, channels: int, outputs: int, groups: int
) -> None:
    """Of the small matrices, environments are shared out: then too."""
    rng = np.random.default_rng(0)
    window = [[3, 1, 1, 1], [3, 1, 1, 1]]
    side = 9 if groups * channels > 20 else 25
    a = rng.standard_normal((60, channels, side, side)).astype(dtype)
    d = rng.standard_normal((60, outputs, side, side)).astype(dtype)
    results = []
    # On the host, CUDA's kernels take no number of threads.
    for threads in (1,) if isa == "cuda" else (1, 2, 3, 8, 64):
        found = empty_moments((outputs, channels // groups, 3, 3), dtype, votes)
        for count, offsets in ((0, [0, 3, 20]), (2, list(range(20, 61, 2)))):
            kernels.outer(
                isa, a, d, offsets, found.sum, found.votes, window=window, count=count,
                groups=groups, threads=threads,
            )  # fmt: skip
        results.append((found.sum.tobytes(), found.votes.tobytes()))
    assert len(set(results)) == 1
    offsets = [0, 3, *range(20, 61, 2)]
    weights = per_environment(per_example(a, d, window, groups), offsets, None)
    sizes = per_environment(per_example(abs(a), abs(d), window, groups), offsets, None)
    assert_moments(found, weights, sizes, 60 * side**2)


# ---- special values ----


@isas
@pytest.mark.parametrize("dtype", list(FORMATS))
@pytest.mark.parametrize("rows", [1, 3, 40, 200])
def test_what_is_not_finite_shows_and_nan_does_not_vote(isa: str, dtype: type, rows: int) -> None:
    rng = np.random.default_rng(rows)
    a, d = rng.standard_normal((5, 40, rows)), rng.standard_normal((5, 20, rows))
    a[0, 3, 0], a[1, 5, -1], d[1, 7, 0], d[3, 9, 0] = np.inf, np.nan, -np.inf, np.nan
    a[2, 6, :] = -np.inf
    a[4, 7, 0], d[4, :, 0] = np.inf, 0.0
    a, d = stored(a, dtype), stored(d, dtype)
    found = empty_moments((20, 40, 1), dtype)
    kernels.outer(isa, a, d, list(range(6)), found.sum, found.votes, window=[POINT])
    with np.errstate(invalid="ignore"):
        weights = per_example(exact(a), exact(d), [POINT], 1)
        signs = np.nan_to_num(np.sign(weights))
        total = weights.sum(0)
    np.testing.assert_array_equal(found.votes, signs.sum(0))
    np.testing.assert_array_equal(np.isnan(found.sum), np.isnan(total))
    infinite = np.isinf(total)
    np.testing.assert_array_equal(found.sum[infinite], total[infinite])


@isas
@pytest.mark.parametrize("small", [1e-20, 1e-23, 1e-30, 1e-38, 1e-44])
def test_products_that_underflow_vote_as_what_is_left_of_them(isa: str, small: float) -> None:
    rng = np.random.default_rng(0)
    a = (rng.standard_normal((30, 70, 1)) * small).astype(np.float32)
    d = (rng.standard_normal((30, 13, 1)) * small).astype(np.float32)
    d[:, ::3] = rng.standard_normal((30, 5, 1))
    a[:, 5], a[:, 6] = 0.0, -0.0
    found = empty_moments((13, 70, 1), np.float32)
    extra = {"squares": found.squares} if isa == "cuda" else {}  # else it multiplies the signs
    kernels.outer(isa, a, d, list(range(31)), found.sum, found.votes, window=[POINT], **extra)
    products = (exact(d)[:, :, None] * exact(a)[:, None, :]).astype(np.float32)
    np.testing.assert_array_equal(found.votes, np.sign(products).sum(0))
    if isa == "cuda":
        kernels.outer(isa, a, d, list(range(31)), found.sum, found.votes, window=[POINT])
        np.testing.assert_array_equal(
            found.votes[..., 0], np.sign(d[..., 0]).T @ np.sign(a[..., 0])
        )


@isas
def test_overflow_within_an_environment_shows(isa: str) -> None:
    a = np.full((2, 20, 300), 1e19, np.float32)
    d = np.full((2, 8, 300), 1e19, np.float32)
    d[0, :, 150:] = -1e19  # infinity, and stays so
    found = empty_moments((8, 20, 1), np.float32)
    kernels.outer(isa, a, d, [0, 1, 2], found.sum, found.votes, window=[POINT])
    assert (found.votes == 2).all()
    assert np.isinf(found.sum).all()
    d[1, 0, 299] = np.nan
    kernels.outer(isa, a, d, [0, 1, 2], found.sum, found.votes, window=[POINT])
    assert np.isnan(found.sum[0]).all()
    assert (found.votes[0] == 1).all()


@isas
@pytest.mark.parametrize("environments", [126, 127, 128, 400])
def test_votes_of_many_environments(isa: str, environments: int) -> None:
    a = np.ones((environments, 20, 1), np.float32)
    d = np.ones((environments, 7, 1), np.float32)
    d[:, 3] = -1
    found = empty_moments((7, 20, 1), np.float32)
    kernels.outer(isa, a, d, list(range(environments + 1)), found.sum, found.votes)
    expected = np.full((7, 20, 1), environments)
    expected[3] = -environments
    np.testing.assert_array_equal(found.votes, expected)
    np.testing.assert_array_equal(found.sum, expected)


@isas
@pytest.mark.parametrize("dtype", list(FORMATS))
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("offsets", [range(9), [0, 2, 4, 6, 8], [0, 1, 5, 8]])
@pytest.mark.parametrize("weights", [[0.25, 4.0, 1.0], [4.0]])
def test_weights_multiply_sums_but_not_votes(
    isa: str, dtype: type, rows: int, offsets: list[int], weights: list[float]
) -> None:
    """All numbers are whole, or quarters: nothing is rounded."""
    rng = np.random.default_rng(rows)
    a, d = rng.integers(-2, 3, (8, 70, rows)), rng.integers(-2, 3, (8, 13, rows))
    order = [int(i) for i in rng.permutation(8)]
    each = [weights[e % len(weights)] for e in range(len(offsets) - 1)]
    found = empty_moments((13, 70, 1), dtype)
    kernels.outer(
        isa,
        stored(a.astype(float), dtype),
        stored(d.astype(float), dtype),
        list(offsets),
        found.sum,
        found.votes,
        window=[POINT],
        order=order,
        weights=each,
    )
    gradients = per_environment(per_example(a, d, [POINT], 1), list(offsets), order)
    np.testing.assert_array_equal(found.votes, np.sign(gradients).sum(0))
    np.testing.assert_array_equal(found.sum, np.tensordot(each, gradients, 1))


@isas
@pytest.mark.parametrize("offsets", [[0, 0, 2], [0, 2, 2], [0, 2, 2, 3], [1, 2, 2]])
@pytest.mark.parametrize("dtype", list(FORMATS))
def test_as_many_environments_as_rows_need_not_have_one_each(
    isa: str, offsets: list[int], dtype: type
) -> None:
    """An empty environment and one of two rows: their signs cannot be voted on row by row."""
    a = stored(np.ones((3, 70, 1)), dtype)
    d = stored(np.array([[3.0], [-1.0], [1.0]])[:, :, None].repeat(5, 1), dtype)
    found = empty_moments((5, 70, 1), dtype)
    kernels.outer(isa, a, d, offsets, found.sum, found.votes, window=[POINT])
    weights = per_environment(per_example(exact(a), exact(d), [POINT], 1), offsets, None)
    np.testing.assert_array_equal(found.votes, np.sign(weights).sum(0))
    np.testing.assert_array_equal(found.sum, weights.sum(0))
