"""The consistency of an algorithm: mean over initial points, its interval, going on later."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from andmask_ext.metrics.consistency import (
    LearningConsistency,
    inconsistency_score,
    invariant_learning_consistency,
)

LOSSES = [lambda x: x @ x / 2, lambda x: 3 * (x @ x) / 2]


def init(generator: torch.Generator) -> Tensor:
    return torch.randn(2, generator=generator, dtype=torch.float64, device="cpu")


def measure(samples: int = 5, **options: object) -> LearningConsistency:
    """An algorithm that stays where it starts: scores differ from sample to sample."""
    return invariant_learning_consistency(lambda x: x, init, LOSSES, 0.1, samples, **options)


def test_mean_and_interval() -> None:
    found = measure(12)
    starts = [init(torch.Generator("cpu").manual_seed(k)) for k in range(12)]
    scores = [float(inconsistency_score(LOSSES, start, 0.1).score) for start in starts]
    assert [float(r.score) for r in found.results] == scores
    assert found.mean == pytest.approx(-np.mean(scores))
    assert found.standard_error == pytest.approx(scipy.stats.sem(scores))
    expected = scipy.stats.t.interval(0.95, 11, loc=found.mean, scale=found.standard_error)
    assert found.interval == pytest.approx(expected)
    assert (found.infinite, found.bound) == (0, "exact")
    wider = measure(12, level=0.999)
    assert wider.interval[0] < found.interval[0] < found.mean < found.interval[1]


def test_trained_to_the_minimum() -> None:
    def train(x: Tensor) -> Tensor:
        for _ in range(200):
            x = x - 0.2 * (x + 3 * x) / 2
        return x

    found = invariant_learning_consistency(train, init, LOSSES, 0.1, 3)
    assert found.mean == pytest.approx(-0.3)
    assert found.standard_error == pytest.approx(0, abs=1e-12)


def test_infinite_scores_are_counted() -> None:
    losses = [lambda x: x @ x, lambda x: x[0].square()]
    found = invariant_learning_consistency(torch.zeros_like, init, losses, 0.1, 3)
    assert found.mean == -math.inf
    assert found.interval == (-math.inf, -math.inf)
    assert math.isnan(found.standard_error)
    assert found.infinite == 3
    assert len(found.results) == 3


def test_one_sample_says_nothing_of_the_error() -> None:
    found = measure(1)
    assert math.isnan(found.standard_error)
    assert found.interval == (-math.inf, math.inf)


def test_kind_of_bound() -> None:
    assert measure(2, method="search", steps=5).bound == "upper bound"
    assert measure(2, method="diagonal", probes=2).bound == "estimate"


def test_seeds() -> None:
    early, late = measure(4), measure(2, seed=2)
    assert [float(r.score) for r in early.results[2:]] == [float(r.score) for r in late.results]


def test_resume_and_stop() -> None:
    calls: list[tuple[int, int]] = []

    def twice(done: int, total: int) -> bool:
        calls.append((done, total))
        return done >= 2

    part = measure(5, progress=twice, method="search", steps=3)
    assert calls == [(0, 5), (1, 5), (2, 5)]
    assert len(part.results) == 2
    whole = measure(5, resume=part, method="search", steps=3)
    assert whole.results[:2] == part.results
    assert whole.mean == measure(5, method="search", steps=3).mean
    assert measure(1, resume=whole).results == whole.results  # nothing is thrown away


def test_readable_in_one_line() -> None:
    found = invariant_learning_consistency(torch.zeros_like, init, LOSSES, 0.1, 2)
    expected = "LearningConsistency -0.3 ± 0 (95 % interval [-0.3, -0.3], 2 samples, 0 infinite, "
    assert repr(found) == expected + "exact)"


@pytest.mark.parametrize("samples", [2, 3, 8, 31])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_interval_is_that_of_student(samples: int, level: float) -> None:
    found = measure(samples, level=level)
    expected = scipy.stats.t.interval(level, samples - 1, found.mean, found.standard_error)
    assert found.interval == pytest.approx(expected, rel=1e-9)


def test_without_scipy_nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    assert float(inconsistency_score(LOSSES, torch.zeros(2), 0.1).score) == pytest.approx(0.3)

    def train(start: Tensor) -> Tensor:
        raise AssertionError("trained")

    with pytest.raises(ImportError, match="needs scipy: `pip install scipy`"):
        invariant_learning_consistency(train, init, LOSSES, 0.1)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"samples": 0}, ValueError, "samples: expected at least 1, but got 0"),
        ({"samples": 1.5}, TypeError, "samples: expected an int, but got float"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, but got -1"),
        ({"level": 1}, ValueError, r"level: expected a number in \(0, 1\), but got 1"),
        ({"eps": 0.0}, ValueError, "eps: expected a positive finite number, but got 0.0"),
        ({"train": None}, TypeError, "train: expected a callable, but got NoneType"),
        ({"init": 3}, TypeError, "init: expected a callable, but got int"),
        ({"generator": None}, TypeError, "generator: not passed on"),
        ({"resume": 3}, TypeError, "resume: expected a LearningConsistency or None, but got int"),
        ({"progress": lambda *_: True}, RuntimeError, "progress: ended the run before its first"),
    ],
)
def test_errors(options: dict[str, object], kind: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {
        "train": lambda x: x,
        "init": init,
        "losses": LOSSES,
        "eps": 0.1,
        "samples": 2,
    }
    with pytest.raises(kind, match=message):
        invariant_learning_consistency(**{**arguments, **options})  # type: ignore[arg-type]


def test_resume_with_another_eps_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"seed 1, but got one with eps 0\.1 and seed 0"):
        measure(2, seed=1, resume=measure(1))
