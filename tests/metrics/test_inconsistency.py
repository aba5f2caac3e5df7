"""The inconsistency score of quadratic losses: closed forms, gaps, slopes, flat directions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from andmask_ext.metrics.consistency import inconsistency_score

from .common import largest_ratio, point, quadratic_losses, random_spd, spd_sets, tilted

F64 = torch.float64


# ---- closed forms ----


@given(curvatures=st.data())
def test_diagonal_closed_form(curvatures: st.DataObject) -> None:
    hessians = curvatures.draw(spd_sets(commuting=True))
    one, other = hessians.diagonal(axis1=1, axis2=2)
    expected = 0.01 * max((one / other).max(), (other / one).max())
    found = inconsistency_score(
        quadratic_losses(hessians), point(len(one)), 0.01, method="quadratic"
    )
    assert float(found.score) == pytest.approx(expected, rel=1e-9)
    assert found.bound == "exact"


@given(hessians=spd_sets(environments=st.integers(2, 4)), eps=st.sampled_from([1e-4, 0.3, 20.0]))
def test_any_hessians_by_generalised_eigenvalues(hessians: np.ndarray, eps: float) -> None:
    n = hessians.shape[-1]
    found = inconsistency_score(quadratic_losses(hessians), point(n), eps)
    assert (found.method, found.bound) == ("quadratic", "exact")
    assert float(found.score) == pytest.approx(eps * largest_ratio(hessians), rel=1e-8)
    for e, one in enumerate(hessians):
        for f, other in enumerate(hessians):
            if e != f:
                expected = eps * scipy.linalg.eigh(other, one, eigvals_only=True)[-1]
                assert float(found.values[e, f]) == pytest.approx(expected, rel=1e-8)
            else:
                assert math.isnan(float(found.values[e, f]))


@given(hessians=spd_sets(environments=st.integers(2, 3)))
def test_witness_attains_the_score(hessians: np.ndarray) -> None:
    losses = quadratic_losses(hessians)
    found = inconsistency_score(losses, point(hessians.shape[-1]), 0.1)
    kept, moved = found.environments
    assert isinstance(found.witness, Tensor)
    assert float(losses[kept](found.witness)) == pytest.approx(0.1, rel=1e-9)
    assert float(losses[moved](found.witness)) == pytest.approx(float(found.score), rel=1e-9)
    assert float(found.values[kept, moved]) == float(found.score)
    assert isinstance(found.direction, Tensor)
    assert float(found.direction.norm()) == pytest.approx(1.0)
    assert float(found.direction @ found.witness) == pytest.approx(float(found.witness.norm()))


@pytest.mark.parametrize("n", [2, 3])
def test_monte_carlo_on_the_edge_never_exceeds_it(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(5):
        hessians = [random_spd(rng, n, 30.0) for _ in range(3)]
        found = float(inconsistency_score(quadratic_losses(hessians), point(n), 0.02).score)
        best = 0.0
        for kept in hessians:
            on_sphere = rng.standard_normal((100_000, n))
            on_sphere *= math.sqrt(2 * 0.02) / np.linalg.norm(on_sphere, axis=1, keepdims=True)
            on_edge = np.linalg.solve(np.linalg.cholesky(kept).T, on_sphere.T).T
            for moved in hessians:
                best = max(best, float(np.einsum("mi,ij,mj->m", on_edge, moved, on_edge).max() / 2))
        assert 0.98 * found <= best <= found * (1 + 1e-9)


def test_order_of_the_pair() -> None:
    losses = quadratic_losses([np.eye(2), 3 * np.eye(2), 2 * np.eye(2)])
    found = inconsistency_score(losses, point(2), 1.0)
    assert found.environments == (0, 1)
    expected = torch.tensor([[math.nan, 3, 2], [1 / 3, math.nan, 2 / 3], [1 / 2, 3 / 2, math.nan]])
    torch.testing.assert_close(found.values, expected.double(), equal_nan=True)


# ---- gaps and slopes ----


@pytest.mark.parametrize("gap", [-5.0, -0.2, 0.1, 3.0])
def test_gap_between_the_losses(gap: float) -> None:
    one, other = quadratic_losses([np.eye(2), np.diag([4.0, 1.0])])
    found = inconsistency_score([one, lambda x: other(x) + gap], point(2), 0.1)
    assert float(found.values[0, 1]) == pytest.approx(max(abs(gap), abs(gap + 0.4)))
    assert float(found.values[1, 0]) == pytest.approx(max(abs(gap), abs(-gap + 0.1)))
    assert found.bound == "exact"


@pytest.mark.parametrize(("depth", "beyond"), [(0.0, False), (0.5, False), (4.0, True)])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_slopes_by_brute_force(n: int, seed: int, depth: float, beyond: bool) -> None:
    """Off the minimum, level sets are ellipsoids about another centre, or shells of two."""
    rng = np.random.default_rng([n, seed])
    eps = 0.05
    hessians = [random_spd(rng, n, 10.0) for _ in range(2)]
    slopes, gap = rng.standard_normal((2, n)), float(rng.standard_normal())
    for slope, hessian in zip(slopes, hessians, strict=True):
        slope *= math.sqrt(depth * eps / (slope @ np.linalg.solve(hessian, slope) / 2))
    plain = quadratic_losses(hessians)
    losses = [tilted(plain[0], slopes[0]), tilted(plain[1], slopes[1], gap)]
    found = inconsistency_score(losses, point(n), eps)
    assert found.bound == "exact"

    def change(e: int, x: np.ndarray) -> np.ndarray:
        return np.einsum("mi,ij,mj->m", x, hessians[e], x) / 2 + x @ slopes[e]

    for kept, moved in ((0, 1), (1, 0)):
        centre = -np.linalg.solve(hessians[kept], slopes[kept])
        reach = slopes[kept] @ -centre / 2 + eps
        box = np.sqrt(2 * reach * np.diag(np.linalg.inv(hessians[kept])))
        x = centre + rng.uniform(-1, 1, (200_000, n)) * box
        inside = np.abs(change(kept, x)) <= eps
        if n == 1 and beyond:  # the other side cannot be reached
            inside &= ((x - centre) * -centre).sum(1) > 0
        offset = gap if moved == 1 else -gap
        best = float(np.abs(change(moved, x[inside]) + offset).max())
        exact = float(found.values[kept, moved])
        assert 0.9 * exact <= best <= exact * (1 + 1e-9)
    kept, moved = found.environments
    start = float(losses[kept](point(n)))
    assert isinstance(found.witness, Tensor)
    assert abs(float(losses[kept](found.witness)) - start) <= eps * (1 + 1e-9)
    reached = abs(float(losses[moved](found.witness)) - start)
    assert reached == pytest.approx(float(found.score), rel=1e-9)


# ---- flat directions and negative curvature ----


def test_flat_direction_of_one_environment() -> None:
    axis = np.array([1.0, 2.0, 2.0, 0.0]) / 3
    flat = np.eye(4) - np.outer(axis, axis)
    losses = quadratic_losses([np.eye(4), 2 * np.eye(4), flat])
    found = inconsistency_score(losses, point(4), 0.1, method="quadratic")
    assert math.isinf(float(found.score))
    assert found.environments[0] == 2
    assert found.witness is None
    assert isinstance(found.direction, Tensor)
    assert abs(float(found.direction @ torch.tensor(axis))) == pytest.approx(1.0, abs=1e-6)


def test_flat_direction_of_both_is_left_out() -> None:
    rng = np.random.default_rng(0)
    small = [random_spd(rng, 3) for _ in range(3)]
    basis, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    hessians = [basis[:, :3] @ h @ basis[:, :3].T for h in small]
    found = inconsistency_score(quadratic_losses(hessians), point(5), 0.1)
    assert float(found.score) == pytest.approx(0.1 * largest_ratio(small), rel=1e-8)
    assert (found.method, found.bound) == ("quadratic", "exact")
    assert any("2 for losses[1]" in note for note in found.notes)


def test_flat_direction_coupled_to_another() -> None:
    """z' H' z about 0 along the flat direction z does not suffice: H' z must vanish."""
    flat = np.diag([1.0, 0.0])
    leaning = np.array([[1.0, 1e-6], [1e-6, 1e-12]])  # null space along (1e-6, -1)
    found = inconsistency_score(quadratic_losses([flat, leaning]), point(2), 0.1, "quadratic")
    assert math.isinf(float(found.score))


def test_slope_along_a_flat_direction() -> None:
    flat, _ = quadratic_losses([np.diag([1.0, 0.0]), np.eye(2)])
    moved = inconsistency_score([flat, lambda x: flat(x) + x[1]], point(2), 0.1, "search", steps=80)
    assert float(moved.values[0, 1]) > 100
    exact = inconsistency_score([flat, lambda x: flat(x) + 0 * x[1]], point(2), 0.1)
    assert float(exact.score) == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"gradient is 1 along directions.*losses\[1\]"):
        inconsistency_score([flat, lambda x: flat(x) + x[1]], point(2), 0.1, "quadratic")


def test_negative_curvature_is_an_error() -> None:
    losses = quadratic_losses([np.eye(3), np.diag([2.0, 1.0, -0.25])])
    with pytest.raises(ValueError, match=r"eigenvalue is -0\.25 \(largest 2\) for losses\[1\]"):
        inconsistency_score(losses, point(3), 0.1, "quadratic")


def test_auto_searches_where_there_is_no_minimum() -> None:
    losses = quadratic_losses([np.eye(2), np.diag([2.0, -0.25])])
    found = inconsistency_score(losses, point(2), 0.1, steps=30, generator=torch.Generator("cpu"))
    assert (found.method, found.bound) == ("search", "lower bound")
    assert any("not quadratic: expected a minimum" in note for note in found.notes)


def test_losses_that_leave_the_model_are_an_estimate() -> None:
    losses = [lambda x: x.square().sum(), lambda x: x.square().sum() + x.pow(4).sum()]
    found = inconsistency_score(losses, point(2), 0.1, "quadratic")
    assert found.bound == "estimate"
    assert float(found.score) == pytest.approx(0.1)
    assert any("leave their quadratic model" in note for note in found.notes)
    searched = inconsistency_score(losses, point(2), 0.1, generator=torch.Generator("cpu"))
    assert searched.method == "search"
    assert float(searched.score) == pytest.approx(0.1 + 0.01, rel=2e-3)
    # The losses agree with the model again where eps is small.
    assert inconsistency_score(losses, point(2), 1e-8, "quadratic").bound == "exact"


def test_losses_of_every_pair_are_compared() -> None:
    """The third loss looks harmless to the model, and is not."""
    plain = quadratic_losses([np.eye(3), 2 * np.eye(3)])
    losses = [*plain, lambda x: plain[0](x) + 50 * x.pow(4).sum()]
    found = inconsistency_score(losses, point(3), 0.1, "quadratic")
    assert found.environments != (0, 2)
    assert found.bound == "estimate"
    assert inconsistency_score([*plain, plain[0]], point(3), 0.1, "quadratic").bound == "exact"


def test_bends_away_from_the_witness_are_seen() -> None:
    """Along y both models are flat, and say nothing; the losses do."""
    losses = [lambda x: x[0].square() + x[1].pow(4), lambda x: 2 * x[0].square() + 9 * x[1].pow(4)]
    assert inconsistency_score(losses, point(2), 0.1, "quadratic").bound == "estimate"
    found = inconsistency_score(losses, point(2), 0.1, generator=torch.Generator("cpu"))
    assert found.method == "search"
    assert float(found.score) == pytest.approx(0.9, rel=5e-3)
    # Where neither is flat: the edge is another off the axes.
    product = [lambda x: x.square().sum(), lambda x: 2 * x.square().sum() + x.prod() * x.sum()]
    assert inconsistency_score(product, point(2), 0.1, "quadratic").bound == "estimate"


def test_infinite_scores_of_models_are_checked_far_out() -> None:
    losses = [lambda x: x[0].square() + x[1].pow(4), lambda x: x.square().sum()]
    found = inconsistency_score(losses, point(2), 0.1, "quadratic")
    assert (float(found.score), found.bound) == (math.inf, "estimate")
    searched = inconsistency_score(losses, point(2), 0.1, generator=torch.Generator("cpu"))
    # On the edge u^2 + v^4 = .1 the other loss is .1 - v^4 + v^2: .1 + .25 is beyond the reach of
    # v^2 <= .1^.5 = .316, where it is .316.
    assert searched.bound == "lower bound"
    assert float(searched.score) == pytest.approx(0.1**0.5, rel=5e-3)


def test_walls_far_out_in_a_flat_direction_are_seen() -> None:
    """The kept loss is level near the point, and ends the level set farther out."""
    losses = [lambda x: x[0].square() + (x[1].abs() - 5).relu(), lambda x: x.square().sum()]
    found = inconsistency_score(losses, point(2), 0.1, "quadratic")
    assert (float(found.score), found.bound) == (math.inf, "estimate")


# ---- dtypes, structures, many parameters ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_dtypes(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(5)
    hessians = [random_spd(rng, 4, 20.0) for _ in range(2)]
    found = inconsistency_score(quadratic_losses(hessians, dtype), point(4, dtype), 0.1)
    rel = 1e-4 if dtype == torch.float32 else 1e-9
    assert float(found.score) == pytest.approx(0.1 * largest_ratio(hessians), rel=rel)
    assert found.bound == "exact"
    assert found.score.dtype == F64
    assert isinstance(found.witness, Tensor)
    assert found.witness.dtype == dtype


@pytest.mark.parametrize("method", ["quadratic", "search", "diagonal"])
def test_dict_of_parameters(method: str) -> None:
    losses = [
        lambda p: p["weight"].square().sum() + p["bias"].square(),
        lambda p: p["weight"].square().sum() + 5 * p["bias"].square(),
    ]
    params = {"weight": torch.zeros(2, 3, dtype=F64), "bias": torch.zeros((), dtype=F64)}
    found = inconsistency_score(losses, params, 0.1, method, generator=torch.Generator("cpu"))
    assert float(found.score) == pytest.approx(0.5, rel=2e-3)
    assert found.environments == (0, 1)
    assert isinstance(found.direction, dict)
    assert {k: v.shape for k, v in found.direction.items()} == {"weight": (2, 3), "bias": ()}
    assert abs(float(found.direction["bias"])) == pytest.approx(1.0, abs=0.02)
    if method != "diagonal":
        assert isinstance(found.witness, dict)
        assert float(losses[0](found.witness)) == pytest.approx(0.1, rel=2e-3)


def test_quadratic_of_too_many_parameters_names_what_to_take() -> None:
    losses = [lambda x: x.square().sum(), lambda x: 2 * x.square().sum()]
    with pytest.raises(ValueError, match=r"'search', 'diagonal' or 'auto' .* for 1001"):
        inconsistency_score(losses, point(1001), 0.1, "quadratic")
    found = inconsistency_score(losses, point(1001), 0.1, steps=3, starts=1)
    assert found.method == "search"


def test_losses_that_vmap_refuses_are_looped_and_said_so() -> None:
    hessians = [np.diag([1.0, 2.0]), np.diag([3.0, 1.0])]
    plain = quadratic_losses(hessians)
    branching = [
        lambda x, e=e: plain[e](x) if float(x[0].detach()) < 1e9 else x.sum() for e in range(2)
    ]
    found = inconsistency_score(branching, point(2), 0.1)
    assert float(found.score) == pytest.approx(0.3)
    assert sum("evaluated point by point" in note for note in found.notes) == 2


def test_tensors_stay_where_the_parameters_are() -> None:
    """Nothing is made on the default device: there are no numbers on meta."""
    start = torch.zeros(2, dtype=F64)
    losses = quadratic_losses([np.diag([1.0, 2.0]), np.diag([3.0, 0.5])])
    for method in ("quadratic", "search", "diagonal"):
        with torch.device("meta"):
            found = inconsistency_score(losses, start, 0.1, method)
        assert float(found.score) == pytest.approx(0.4, rel=2e-3)
        assert found.score.device == start.device


def test_readable_in_one_line() -> None:
    found = inconsistency_score(quadratic_losses([np.eye(2), 3 * np.eye(2)]), point(2), 0.1)
    expected = "Inconsistency 0.3 at eps 0.1: environment 0 kept, 1 moves (quadratic, exact)"
    assert repr(found) == str(found) == expected
