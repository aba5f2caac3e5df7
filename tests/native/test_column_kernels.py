"""Column rules of every instruction set against numpy, without torch (see `make sanitize`)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from .. import strategies
from . import harness
from .rules import COLUMN_RULES
from .test_masked_mean_kernels import from_bfloat16, to_bfloat16

kernels = harness.load()

isas = pytest.mark.parametrize("isa", kernels.isas())
names = pytest.mark.parametrize("name", COLUMN_RULES)


def noise_like(grads: np.ndarray) -> np.ndarray:
    kind = np.float64 if grads.dtype == np.float64 else np.float32
    return np.random.default_rng(1).random(grads.shape[1]).astype(kind)


def arguments_for(name: str, environments: int) -> list[float]:
    return [float((environments - 1) // 2)] if name == "trimmed_mean" else COLUMN_RULES[name]


def formula(name: str, arguments: list[float], g: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The rules in float64, for finite values away from any jump."""
    match name:
        case "median":
            return np.median(g, axis=0)
        case "trimmed_mean":
            b = int(arguments[0])
            return np.sort(g, axis=0)[b : len(g) - b].mean(axis=0)
        case "winsorized_mean":
            low, high = np.percentile(g, [arguments[0], 100 - arguments[0]], axis=0)
            return np.clip(g, low, high).mean(axis=0)
        case "sign_dropout":
            share = (1 + g.sum(axis=0) / np.abs(g).sum(axis=0)) / 2
            return (g * ((share > noise) * (g > 0) + (share < noise) * (g < 0))).sum(axis=0)
        case "fed_ilc":
            kept = np.abs(np.sign(g).sum(axis=0)) >= kernels.vote_threshold(arguments[0], len(g))
            sides = []
            for side in (g, -g):
                count = (side > 0).sum(axis=0)
                logs = np.log(np.where(side > 0, side, 1)).sum(axis=0)
                sides.append(count / len(g) * np.exp(logs / np.maximum(count, 1)))
            return kept * (sides[0] - sides[1])
        case "agreement_random":
            total = g.sum(axis=0)
            kept = np.abs(np.sign(g).sum(axis=0)) == len(g)
            return np.where(kept, total, noise * (np.abs(total[kept]).mean() if kept.any() else 0))
    raise AssertionError(name)


@isas
@names
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("environments", [1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 100, 513, 700])
def test_matches_numpy(isa: str, name: str, dtype: type, environments: int) -> None:
    """On both sides of every edge: of runs of 32, of the listed networks, of blocks of columns."""
    rng = np.random.default_rng(environments)
    arguments = arguments_for(name, environments)
    for columns in (1, 31, 130, 600):
        grads = (rng.standard_normal((environments, columns)) + rng.choice([0, 2])).astype(dtype)
        noise = noise_like(grads)
        out = kernels.aggregate(isa, grads, name, arguments, noise)
        wide = grads.astype(np.float64)
        expected = formula(name, arguments, wide, noise)
        eps = max(np.finfo(dtype).eps, 1e-13 if dtype == np.float64 else 1e-6)
        size = np.abs(wide).max(axis=0) * (environments if "_" in name else 1)
        assert out.dtype == dtype
        assert (np.abs(out - expected) <= eps * (np.abs(expected) + size)).all()


@names
@given(grads=strategies.stacked(np.float32), data=st.data())
def test_instruction_sets_and_splits_give_the_same_bits(
    name: str, grads: np.ndarray, data: st.DataObject
) -> None:
    unit = 256 if name == "agreement_random" else 1  # its statistic is summed block by block
    blocks = grads.shape[1] // unit
    splits = sorted(unit * s for s in data.draw(st.lists(st.integers(0, blocks), max_size=4)))
    arguments = arguments_for(name, len(grads))
    for array in (grads, grads.astype(np.float64), to_bfloat16(grads)):
        noise = noise_like(array)
        expected = kernels.aggregate("baseline", array, name, arguments, noise)
        for isa in kernels.isas():
            out = kernels.aggregate(isa, array, name, arguments, noise, splits)
            assert out.tobytes() == expected.tobytes()


@isas
@names
@given(data=st.data())
def test_nothing_non_finite_is_hidden(isa: str, name: str, data: st.DataObject) -> None:
    grads = data.draw(strategies.stacked(np.float32))
    bad = ~np.isfinite(grads).all(axis=0)
    arguments = arguments_for(name, len(grads))
    out = kernels.aggregate(isa, grads, name, arguments, noise_like(grads))
    assert not np.isfinite(out[bad]).any()
    bits = to_bfloat16(grads)
    bad = ~np.isfinite(from_bfloat16(bits)).all(axis=0)
    out = kernels.aggregate(isa, bits, name, arguments, noise_like(bits))
    assert not np.isfinite(from_bfloat16(out)[bad]).any()


@isas
@pytest.mark.parametrize("environments", [2, 7, 32, 33, 90, 600])
def test_sorting_zeros_and_ones_sorts_everything(isa: str, environments: int) -> None:
    """The 0-1 principle: every count of ones in every place, ranked one by one."""
    rng = np.random.default_rng(0)
    ones = rng.integers(0, environments + 1, 300)
    grads = np.argsort(rng.random((environments, 300)), axis=0) < ones
    for dropped in range((environments + 1) // 2):
        if environments > 40 and dropped % 37 and dropped != (environments - 1) // 2:
            continue
        out = kernels.aggregate(isa, grads.astype(np.float32), "trimmed_mean", [float(dropped)])
        inner = np.clip(ones - dropped, 0, environments - 2 * dropped)
        np.testing.assert_allclose(out, inner / (environments - 2 * dropped), rtol=1e-6)


@isas
@pytest.mark.parametrize("stride", [0, 7, 64, 1000])
def test_rows_may_lie_anywhere(isa: str, stride: int) -> None:
    memory = np.random.default_rng(0).standard_normal(40 * 1000 + 7).astype(np.float32)
    for environments in (8, 40):
        grads = np.lib.stride_tricks.as_strided(memory, (environments, 7), (4 * stride, 4))
        for name, arguments in COLUMN_RULES.items():
            noise = noise_like(grads)
            out = kernels.aggregate(isa, grads, name, arguments, noise)
            expected = kernels.aggregate(isa, np.ascontiguousarray(grads), name, arguments, noise)
            np.testing.assert_array_equal(out, expected)


def test_harness_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="there is no mode"):
        kernels.aggregate("baseline", np.zeros((2, 3), np.float32), "mode")
