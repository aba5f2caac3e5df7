"""The CUDA kernel bodies of moments and optimizer steps, run thread by thread on the host.

They work in the order of the CPU kernels, which test_moments_kernels.py holds against the
definition: so results must have the same bits, for lists of any length.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.native import harness
from tests.native.arrays import DTYPES, placed, same_bits, stored, wide_type
from tests.native.rules import MOMENT_RULES
from tests.strategies import stacked

native = harness.load()
KINDS = ("sum", "votes", "squares", "logs")
Lists = dict[str, list[NDArray]]

sizes = st.one_of(
    st.integers(0, 40), st.sampled_from([255, 256, 1023, 1024, 1025, 4095, 4096, 4097, 8200])
)
skips = st.sampled_from([0, 0, 0, 1, 3])


@st.composite
def tensors(draw: st.DrawFn, environments: int) -> NDArray:
    """One tensor's stacked gradients, in a drawn dtype and place."""
    dtype = draw(st.sampled_from(DTYPES))
    like = np.float32 if dtype is np.uint16 else dtype
    columns = draw(sizes)
    values = draw(stacked(like, environments=st.just(environments), columns=st.just(columns)))
    pad = draw(st.sampled_from([0, -columns % 8, 1]))
    grads = placed(np.pad(stored(values, dtype), ((0, 0), (0, pad))), draw(skips))
    return grads[:, :columns]


def rubbish(grads: NDArray, votes: type, kinds: tuple[str, ...], skip: int) -> dict[str, NDArray]:
    """Moments before the first environment, which must overwrite them."""
    wide, columns = wide_type(grads.dtype.type), grads.shape[1]
    return {
        kind: placed(
            np.full(columns, 77, votes) if kind == "votes" else np.full(columns, 1e9, wide), skip
        )
        for kind in kinds
    }


def as_lists(memory: list[dict[str, NDArray]]) -> Lists:
    return {kind: [one[kind] for one in memory] for kind in memory[0]}


def assert_same(found: Lists, expected: Lists) -> None:
    for kind, arrays in expected.items():
        for index, array in enumerate(arrays):
            assert same_bits(found[kind][index], array), (kind, index)


@given(data=st.data())
def test_accumulate_has_the_bits_of_the_cpu(data: st.DataObject) -> None:
    environments = data.draw(st.sampled_from([1, 1, 2, 3, 4, 5, 9, 40]))
    grads = data.draw(st.lists(tensors(environments), min_size=1, max_size=4))
    kinds = ("sum", *data.draw(st.lists(st.sampled_from(KINDS[1:]), unique=True)))
    votes = data.draw(st.sampled_from([np.int8, np.int16, np.int32]))
    weights = data.draw(
        st.sampled_from([[], [0.25] * environments, list(0.5 + np.arange(environments))])
    )
    cut = data.draw(st.integers(0, environments))
    skip = data.draw(skips)
    found = as_lists([rubbish(one, votes, kinds, skip) for one in grads])
    expected = as_lists([rubbish(one, votes, kinds, 0) for one in grads])
    for part in (slice(0, cut), slice(cut, environments)):  # two calls
        if part.start == part.stop:
            continue
        some = weights[part]
        native.cuda_accumulate([one[part] for one in grads], part.start, found, some)
        for index, one in enumerate(grads):
            memory = {kind: arrays[index] for kind, arrays in expected.items()}
            native.accumulate("baseline", one[part], part.start, weights=some, **memory)
    assert_same(found, expected)


def test_a_list_longer_than_the_arguments_of_one_kernel() -> None:
    rng = np.random.default_rng(0)
    grads = [
        stored(rng.standard_normal((2, columns)), dtype)
        for columns in [3, 0, 4097, *rng.integers(0, 9, 900)]
        for dtype in (np.float32, np.float16)
    ]
    found = as_lists([rubbish(one, np.int8, KINDS, 0) for one in grads])
    expected = as_lists([rubbish(one, np.int8, KINDS, 0) for one in grads])
    native.cuda_accumulate(grads, 0, found)
    for index, one in enumerate(grads):
        memory = {kind: arrays[index] for kind, arrays in expected.items()}
        native.accumulate("baseline", one, 0, **memory)
    assert_same(found, expected)
    for rescale in (False, True):
        out = [np.empty_like(total) for total in found["sum"]]
        native.cuda_resolve("and_mask", [0.7], 2, found, rescale, out)
        for index, update in enumerate(out):
            memory = {kind: arrays[index] for kind, arrays in expected.items()}
            assert same_bits(update, by_cpu("and_mask", [0.7], 2, memory, rescale)), index


def test_rows_more_than_two_to_the_31_apart() -> None:
    """The second row lies 8 GiB behind the first; what is never touched takes no memory."""
    stride = (1 << 31) + 4
    memory = np.zeros(stride + 64, np.float32)  # pages are mapped when they are written
    memory[:9] = np.arange(9)
    memory[stride : stride + 9] = -2.0
    grads = np.lib.stride_tricks.as_strided(memory, (2, 9), (4 * stride, 4))
    found = as_lists([rubbish(np.zeros((2, 9), np.float32), np.int8, ("sum", "votes"), 0)])
    native.cuda_accumulate([grads], 0, found)
    np.testing.assert_array_equal(found["sum"][0], np.arange(9) - 2.0)
    np.testing.assert_array_equal(found["votes"][0], [-1, *[0] * 8])


def by_cpu(
    rule: str, arguments: list[float], count: int, memory: dict[str, NDArray], rescale: bool
) -> NDArray:
    """Return the update in the dtype of the sum."""
    total = memory["sum"]
    update, factor = native.resolve("baseline", rule, arguments, count, **memory)
    if rescale and len(total):
        scale = native.inverse_density(factor, len(total))
        update, _ = native.resolve("baseline", rule, arguments, count, **memory, scale=scale)
    out = np.empty_like(total)
    native.store("baseline", update, out)
    return out


@st.composite
def moment_lists(draw: st.DrawFn) -> tuple[int, Lists]:
    """Moments of a list of tensors after some environments."""
    count = draw(st.sampled_from([1, 2, 3, 5, 20, 127]))
    votes = draw(st.sampled_from([np.int8, np.int16, np.int32]))
    memory = []
    for grads in draw(st.lists(tensors(count), min_size=1, max_size=4)):
        one = rubbish(grads, votes, KINDS, draw(skips))
        native.accumulate("baseline", grads, 0, **one)
        memory.append(one)
    return count, as_lists(memory)


@pytest.mark.parametrize("rule", MOMENT_RULES)
@given(drawn=moment_lists(), rescale=st.booleans(), in_place=st.booleans())
def test_resolve_has_the_bits_of_the_cpu(
    rule: str, drawn: tuple[int, Lists], rescale: bool, in_place: bool
) -> None:
    count, lists = drawn
    expected = [
        by_cpu(rule, MOMENT_RULES[rule], count, {kind: lists[kind][i] for kind in KINDS}, rescale)
        for i in range(len(lists["sum"]))
    ]
    out = lists["sum"] if in_place else [np.empty_like(total) for total in lists["sum"]]
    native.cuda_resolve(rule, MOMENT_RULES[rule], count, lists, rescale, out)
    for update, right in zip(out, expected, strict=True):
        if rescale and rule in ("sand_mask", "masked_average"):
            # Factors that are not whole numbers are added up in another order.
            np.testing.assert_allclose(update, right, 1e-5 if right.dtype == np.float32 else 1e-12)
        else:
            assert same_bits(update, right)


@pytest.mark.parametrize("rule", ["sand_mask", "masked_average"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scales_do_not_depend_on_alignment(rule: str, dtype: type) -> None:
    """Factors that are not whole numbers are added up in one order, wherever arrays begin."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        grads = rng.standard_normal((5, 5000)).astype(dtype)
        updates = []
        for skip in (0, 1):
            lists = as_lists([rubbish(grads, np.int8, KINDS, skip)])
            native.cuda_accumulate([grads], 0, lists)
            updates.append(np.empty(5000, dtype))
            native.cuda_resolve(rule, MOMENT_RULES[rule], 5, lists, True, [updates[-1]])
        np.testing.assert_array_equal(*updates)


@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
@given(data=st.data())
def test_resolve_of_plain_16_bit_gradients(dtype: type, data: st.DataObject) -> None:
    like = np.float32 if dtype is np.uint16 else dtype
    grads = stored(data.draw(stacked(like, environments=st.just(1)))[0], dtype)
    total = placed(grads, data.draw(skips))
    out = [np.empty_like(total)]
    native.cuda_resolve("mean", [], 1, {"sum": [total]}, False, out)
    assert same_bits(out[0], by_cpu("mean", [], 1, {"sum": grads}, False))


@pytest.mark.parametrize("rule", MOMENT_RULES)
@given(drawn=moment_lists(), rescale=st.booleans())
def test_squared_norm_is_that_of_the_updates(
    rule: str, drawn: tuple[int, Lists], rescale: bool
) -> None:
    """Of tensors of both widths, aligned or not; in another order than on the CPU."""
    count, lists = drawn
    found = native.cuda_squared_norm(rule, MOMENT_RULES[rule], count, lists, rescale)
    out = [np.empty_like(total) for total in lists["sum"]]
    native.cuda_resolve(rule, MOMENT_RULES[rule], count, lists, rescale, out)
    with np.errstate(all="ignore"):
        expected = sum(np.square(update.astype(np.longdouble)).sum() for update in out)
    np.testing.assert_allclose(found, np.float64(expected), rtol=1e-12)


def test_squared_norm_of_a_list_longer_than_the_arguments_of_one_kernel() -> None:
    rng = np.random.default_rng(0)
    some = [
        rng.standard_normal(columns).astype(dtype)
        for columns in [3, 0, 4097, *rng.integers(0, 9, 900)]
        for dtype in (np.float32, np.float16, np.float64)
    ]
    found = native.cuda_squared_norm("mean", [], 1, {"sum": some}, False)
    expected = sum(np.square(one.astype(np.float64)).sum() for one in some)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# ---- optimizer steps ----


@st.composite
def parameters(draw: st.DrawFn, lists: Lists, states: int) -> list[list[NDArray]]:
    """Parameters that fit the sums, and so many states of the wide type."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    params: list[list[NDArray]] = [[] for _ in range(states + 1)]
    for total in lists["sum"]:
        dtype = draw(st.sampled_from([np.float64] if total.dtype == np.float64 else DTYPES[:3]))
        values = rng.standard_normal(len(total))
        params[0].append(placed(stored(values, dtype), draw(skips)))
        for state in range(states):
            random = np.abs(rng.standard_normal(len(total))).astype(total.dtype) * (state + 1)
            params[state + 1].append(placed(random, draw(skips)))
    return params


def copies(arrays: list[list[NDArray]]) -> list[list[NDArray]]:
    return [[array.copy() for array in some] for some in arrays]


factors = st.sampled_from([None, None, 1.0, 0.3])


def updates_by_cpu(
    count: int, lists: Lists, rescale: bool, grad_scale: float | None = None
) -> list[NDArray]:
    updates = []
    for index, total in enumerate(lists["sum"]):
        memory = {kind: lists[kind][index] for kind in KINDS}
        _, kept = native.resolve("baseline", "and_mask", [0.5], count, **memory)
        scale = native.inverse_density(kept, len(total)) if rescale and len(total) else 1.0
        update, _ = native.resolve(
            "baseline", "and_mask", [0.5], count, **memory, scale=scale, grad_scale=grad_scale
        )
        updates.append(update)
    return updates


@given(data=st.data(), drawn=moment_lists(), rescale=st.booleans())
def test_sgd_has_the_bits_of_the_cpu(
    data: st.DataObject, drawn: tuple[int, Lists], rescale: bool
) -> None:
    count, lists = drawn
    momentum = data.draw(st.sampled_from([0.0, 0.9]))
    found = data.draw(parameters(lists, 1))
    expected = copies(found)
    options = {
        "lr": 0.1,
        "momentum": momentum,
        "dampening": 0.25,
        "weight_decay": data.draw(st.sampled_from([0.0, 0.01])),
        **{
            name: data.draw(st.booleans())
            for name in ("decoupled_weight_decay", "nesterov", "maximize", "first")
        },
    }
    buffers, factor = found[1] if momentum else [], data.draw(factors)
    native.cuda_sgd(
        "and_mask", [0.5], count, lists, rescale, found[0], buffers, **options, grad_scale=factor
    )
    for index, update in enumerate(updates_by_cpu(count, lists, rescale, factor)):
        buffer = expected[1][index] if momentum else None
        native.sgd("baseline", expected[0][index], buffer, update, **options)
    for one, other in zip(found, expected, strict=True):
        for index, array in enumerate(other):
            assert same_bits(one[index], array), index


@given(data=st.data(), drawn=moment_lists(), rescale=st.booleans())
def test_adam_has_the_bits_of_the_cpu(
    data: st.DataObject, drawn: tuple[int, Lists], rescale: bool
) -> None:
    count, lists = drawn
    amsgrad = data.draw(st.booleans())
    found = data.draw(parameters(lists, 3))
    expected = copies(found)
    before = [data.draw(st.integers(0, 1000)) for _ in found[0]]
    steps = [np.full((), step, np.float32) for step in before]
    betas = data.draw(st.sampled_from([[0.9, 0.999], [0.0, 0.0], [0.5, 0.9]]))
    options = {
        "lr": 0.1,
        "eps": 1e-8,
        "weight_decay": data.draw(st.sampled_from([0.0, 0.01])),
        **{name: data.draw(st.booleans()) for name in ("decoupled_weight_decay", "maximize")},
    }
    params, exp_avgs, exp_avg_sqs, largest = found
    factor = data.draw(factors)
    native.cuda_adam(
        "and_mask", [0.5], count, lists, rescale, params, exp_avgs, exp_avg_sqs,
        largest if amsgrad else [], [], steps, betas=betas, **options, grad_scale=factor,
    )  # fmt: skip
    assert [float(step) for step in steps] == [step + 1 for step in before]
    for index, update in enumerate(updates_by_cpu(count, lists, rescale, factor)):
        corrections = [1 - beta ** float(before[index] + 1) for beta in betas]
        param, exp_avg, exp_avg_sq, most = (some[index] for some in expected)
        native.adam(
            "baseline", param, exp_avg, exp_avg_sq, most if amsgrad else None, None, update,
            corrections, betas=betas, **options,
        )  # fmt: skip
    for one, other in zip(found, expected, strict=True):
        for index, array in enumerate(other):
            assert same_bits(one[index], array), index


@given(data=st.data())
def test_temporal_adam_has_the_bits_of_the_cpu(data: st.DataObject) -> None:
    grads = [one[0] for one in data.draw(st.lists(tensors(1), min_size=1, max_size=4))]
    wide = {"sum": [np.empty(len(one), wide_type(one.dtype.type)) for one in grads]}
    found = data.draw(parameters(wide, 3))
    expected = copies(found)
    steps = [np.full((), 4, np.float32) for _ in grads]
    corrected = data.draw(st.booleans())
    betas = [0.9, 0.99, 0.7]
    options = {
        "lr": 0.1,
        "tau": data.draw(st.sampled_from([0.0, 0.4])),
        "weight_decay": data.draw(st.sampled_from([0.0, 0.01])),
        **{name: data.draw(st.booleans()) for name in ("decoupled_weight_decay", "maximize")},
    }
    native.cuda_adam(
        "mean", [], 1, {"sum": grads}, False, *found[:3], [], found[3], steps, betas=betas,
        bias_correction=corrected, **options,
    )  # fmt: skip
    for index, grad in enumerate(grads):
        update, _ = native.resolve("baseline", "mean", [], 1, grad)
        corrections = [1 - beta**5.0 if corrected else 1.0 for beta in betas]
        param, exp_avg, exp_avg_sq, sign_avg = (some[index] for some in expected)
        native.adam(
            "baseline", param, exp_avg, exp_avg_sq, None, sign_avg, update, corrections,
            betas=betas, **options,
        )  # fmt: skip
    for one, other in zip(found, expected, strict=True):
        for index, array in enumerate(other):
            assert same_bits(one[index], array), index
