"""Diagonals of Hessians by random probes, and the score that they give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from andmask_ext.metrics.consistency import _diagonal as diagonal_module
from andmask_ext.metrics.consistency import (
    hessian_diagonals,
    hessian_means,
    inconsistency_score,
)

from .common import point, quadratic_losses, random_spd, seeded

F64 = torch.float64


def test_diagonal_hessians_are_exact() -> None:
    values = np.array([[1.0, 2.0, 4.0], [3.0, 1.0, 4.0]])
    losses = quadratic_losses([np.diag(v) for v in values])
    found = inconsistency_score(losses, point(3), 0.1, "diagonal", probes=2)
    assert float(found.score) == pytest.approx(0.3)
    assert found.environments == (0, 1)
    assert (found.method, found.bound) == ("diagonal", "estimate")
    assert found.standard_error == 0
    assert isinstance(found.direction, Tensor)
    assert found.direction.tolist() == [1.0, 0.0, 0.0]
    assert found.witness is None
    assert found.notes == ()


@pytest.mark.parametrize("probes", [100, 1000])
def test_estimates_within_their_standard_errors(probes: int) -> None:
    rng = np.random.default_rng(0)
    hessians = [random_spd(rng, 40) for _ in range(2)]
    found = hessian_diagonals(
        quadratic_losses(hessians), point(40), probes=probes, generator=seeded()
    )
    for hessian, mean, error in zip(hessians, found.diagonals, found.standard_errors, strict=True):
        off = hessian - np.diag(np.diag(hessian))
        expected = np.sqrt((off**2).sum(1) / probes)  # the probes' true deviation
        np.testing.assert_allclose(np.asarray(error.cpu()), expected, rtol=0.35)
        scores = (np.asarray(mean.cpu()) - np.diag(hessian)) / expected
        assert np.abs(scores).max() < 4.5
        assert 0.7 < np.sqrt((scores**2).mean()) < 1.3
    assert found.probes == probes


def test_probes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Means and errors do not depend on how many probes are held at once."""
    losses = quadratic_losses([random_spd(np.random.default_rng(0), 6)] * 2)
    whole = hessian_diagonals(losses, point(6), probes=20, generator=seeded())
    monkeypatch.setattr(diagonal_module, "CHUNK", 3)
    parts = hessian_diagonals(losses, point(6), probes=20, generator=seeded())
    torch.testing.assert_close(parts.diagonals, whole.diagonals)
    torch.testing.assert_close(parts.standard_errors, whole.standard_errors)


def test_many_probes_find_the_largest_ratio() -> None:
    rng = np.random.default_rng(1)
    hessians = [np.diag(np.exp(rng.uniform(-1, 1, 20))) for _ in range(2)]
    for hessian in hessians:
        noise = rng.standard_normal((20, 20)) * 0.02
        hessian += noise + noise.T
    diagonals = [np.diag(h) for h in hessians]
    expected = 0.1 * max((diagonals[0] / diagonals[1]).max(), (diagonals[1] / diagonals[0]).max())
    found = inconsistency_score(
        quadratic_losses(hessians), point(20), 0.1, "diagonal", probes=2000, generator=seeded()
    )
    assert found.standard_error is not None
    assert 0 < found.standard_error < 0.02 * expected
    assert abs(float(found.score) - expected) < 5 * found.standard_error


def test_noise_is_left_out_and_counted() -> None:
    """A small curvature under large noise would otherwise make a huge ratio."""
    coupled = np.eye(6)
    coupled[0, 0] = 1e-6
    coupled[0, 1:] = coupled[1:, 0] = 0.5
    losses = quadratic_losses([coupled, np.eye(6)])
    found = inconsistency_score(losses, point(6), 0.1, "diagonal", probes=200, generator=seeded())
    assert float(found.score) < 0.15
    assert "losses[0]: of 6 coordinates 0 left out for negative curvature, 1" in found.notes[0]


def test_negative_curvature_is_left_out_and_counted() -> None:
    losses = quadratic_losses([np.diag([1.0, -2.0, 1.0]), np.diag([2.0, 9.0, 1.0])])
    found = inconsistency_score(losses, point(3), 0.1, "diagonal", probes=2)
    assert float(found.score) == pytest.approx(0.2)
    assert "losses[0]: of 3 coordinates 1 left out for negative curvature, 0" in found.notes[0]


def test_exact_zeros() -> None:
    losses = quadratic_losses([np.diag([1.0, 0.0, 0.0]), np.diag([2.0, 0.0, 0.5])])
    found = inconsistency_score(losses, point(3), 0.1, "diagonal", probes=2)
    assert float(found.score) == math.inf
    assert found.environments == (0, 1)
    assert float(found.values[1, 0]) == pytest.approx(0.05)  # the moved loss may be flat
    assert isinstance(found.direction, Tensor)
    assert found.direction.tolist() == [0.0, 0.0, 1.0]


def test_gap_counts() -> None:
    plain = quadratic_losses([np.eye(2), 2 * np.eye(2)])
    found = inconsistency_score([plain[0], lambda x: plain[1](x) + 3], point(2), 0.1, "diagonal")
    assert float(found.values[0, 1]) == pytest.approx(3.2)
    assert float(found.values[1, 0]) == pytest.approx(3.0)


def test_slope_is_noted() -> None:
    plain = quadratic_losses([np.eye(2), 2 * np.eye(2)])
    found = inconsistency_score([plain[0], lambda x: plain[1](x) + x[0]], point(2), 0.1, "diagonal")
    assert found.notes == ("losses[1]: its own minimum lies 0.25 below params (eps is 0.1)",)


def test_nothing_but_noise_is_an_error() -> None:
    off = np.ones((4, 4)) - np.eye(4)
    with pytest.raises(ValueError, match=r"probes: expected enough to see.*but got 5"):
        inconsistency_score(
            quadratic_losses([off, off]), point(4), 0.1, "diagonal", probes=5, generator=seeded()
        )


def test_same_generator_same_estimate() -> None:
    losses = quadratic_losses([random_spd(np.random.default_rng(0), 5)] * 2)
    one, two = (hessian_diagonals(losses, point(5), generator=seeded(3)) for _ in range(2))
    other = hessian_diagonals(losses, point(5), generator=seeded(4))
    assert torch.equal(one.diagonals[0], two.diagonals[0])
    assert not torch.equal(one.diagonals[0], other.diagonals[0])


def test_in_the_structure_of_the_parameters_and_into_means() -> None:
    losses = [
        lambda p: (p["w"].square().sum() + 4 * p["b"].square()) / 2,
        lambda p: (9 * p["w"].square().sum() + p["b"].square()) / 2,
    ]
    params = {"w": torch.zeros(2, 2), "b": torch.zeros(())}
    found = hessian_diagonals(losses, params, probes=2)
    assert isinstance(found.diagonals[1], dict)
    assert found.diagonals[1]["w"].tolist() == [[9.0, 9.0], [9.0, 9.0]]
    means = hessian_means(found.diagonals)
    assert isinstance(means.geometric, dict)
    torch.testing.assert_close(means.geometric["w"], torch.full((2, 2), 3.0))
    torch.testing.assert_close(means.geometric["b"], torch.tensor(2.0))
