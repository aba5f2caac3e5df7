"""The search: a lower bound, attained on a path that never leaves the level set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from andmask_ext.metrics.consistency import _search as search_module
from andmask_ext.metrics.consistency import inconsistency_score

from .common import patchwork, point, quadratic_losses, random_spd, seeded, spd_sets, tilted

F64 = torch.float64


@given(hessians=spd_sets(environments=st.integers(2, 3)), seed=st.integers(0, 100))
@settings(max_examples=6)
def test_quadratics_from_below(hessians: np.ndarray, seed: int) -> None:
    n = hessians.shape[-1]
    losses = quadratic_losses(hessians)
    exact = inconsistency_score(losses, point(n), 0.01, "quadratic")
    found = inconsistency_score(losses, point(n), 0.01, "search", steps=120, generator=seeded(seed))
    assert found.bound == "lower bound"
    ratios = (found.values / exact.values).nan_to_num(nan=1.0)
    assert bool((ratios <= 1 + 1e-9).all())
    assert bool((ratios >= 0.95).all())


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [0.5, 30.0])
def test_off_the_minimum(n: int, depth: float) -> None:
    """Level sets are ellipsoids off the point, or thin shells that must be gone round."""
    rng = np.random.default_rng([n, int(depth)])
    hessians = [random_spd(rng, n, 20.0) for _ in range(2)]
    losses = []
    for plain, hessian in zip(quadratic_losses(hessians), hessians, strict=True):
        slope = rng.standard_normal(n)
        slope *= np.sqrt(depth * 0.05 / (slope @ np.linalg.solve(hessian, slope) / 2))
        losses.append(tilted(plain, slope, float(rng.standard_normal())))
    exact = inconsistency_score(losses, point(n), 0.05, "quadratic")
    found = inconsistency_score(losses, point(n), 0.05, "search", generator=seeded())
    ratios = (found.values / exact.values).nan_to_num(nan=1.0)
    assert bool((ratios <= 1 + 1e-7).all())
    assert bool((ratios >= 0.95).all())


@pytest.mark.parametrize("n", [30, 150])
def test_ill_conditioned_quadratics(n: int) -> None:
    rng = np.random.default_rng(n)
    losses = quadratic_losses([random_spd(rng, n, 1e5) for _ in range(2)])
    exact = inconsistency_score(losses, point(n), 0.01, "quadratic")
    found = inconsistency_score(losses, point(n), 0.01, "search", steps=200, generator=seeded())
    assert 0.95 <= float(found.score / exact.score) <= 1 + 1e-9


def test_patchwork_network() -> None:
    losses, theta = patchwork()
    assert [round(float(loss(theta)), 4) for loss in losses] == [0.0032, 0.0032]
    found = inconsistency_score(losses, theta, 0.01, steps=60, generator=seeded())
    assert found.method == "search"  # the point is no minimum of either loss
    witness = found.witness
    assert isinstance(witness, Tensor)
    assert found.environments == (0, 1)
    assert abs(float(losses[0](witness)) - float(losses[0](theta))) <= 0.01
    assert float(losses[1](witness)) >= 1.0
    reached = abs(float(losses[1](witness)) - float(losses[0](theta)))
    assert reached == pytest.approx(float(found.score), rel=1e-9)


def test_patchwork_by_hand() -> None:
    """The paper's own witness: the second unit turned round."""
    losses, theta = patchwork()
    turned = theta.clone()
    turned[5] = -0.5
    assert float(losses[0](turned)) == pytest.approx(0.0032, abs=5e-5)
    assert float(losses[1](turned)) == pytest.approx(1.06, abs=0.01)


def valley(x: Tensor) -> Tensor:
    """A curved valley, narrow and nearly level along its floor."""
    return 100 * (x[1] - x[0].square()).square() + 0.05 * x[0].square()


@pytest.mark.parametrize("seed", range(3))
def test_travels_along_a_curved_valley(seed: int) -> None:
    grid = torch.meshgrid(
        torch.linspace(-2, 2, 2001, dtype=F64),
        torch.linspace(-1, 3, 2001, dtype=F64),
        indexing="ij",
    )
    inside = valley(torch.stack(grid)) <= 0.1
    best = float((grid[0].square() + grid[1].square())[inside].max())
    found = inconsistency_score(
        [valley, lambda x: x.square().sum()], point(2), 0.1, "search", generator=seeded(seed)
    )
    assert 0.95 * best <= float(found.values[0, 1]) <= 1.01 * best


def test_needs_the_draw_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The valley is a test of the steps: without the way back to the level set it is not passed."""
    monkeypatch.setattr(search_module.Climb, "draw_back", lambda self, ends: ends)
    found = inconsistency_score(
        [valley, lambda x: x.square().sum()], point(2), 0.1, "search", generator=seeded()
    )
    assert float(found.values[0, 1]) < 4


def wall(width: float) -> list[object]:
    """Level but for a wall of the given width about 1, and a loss that grows beyond it."""

    def kept(x: Tensor) -> Tensor:
        return (-((x[0] - 1) / width).square()).exp() + 0 * x[0]

    return [kept, lambda x: x[0].square()]


def test_does_not_step_over_a_wall() -> None:
    found = inconsistency_score(wall(0.3), point(1), 0.1, "search", generator=seeded())
    # exp(-((x - 1) / .3)^2) = .1 at x = 1 - .3 * log(10)^.5; the other side is free
    assert isinstance(found.witness, Tensor)
    assert float(found.witness[0]) < 1 - 0.3 * np.log(10) ** 0.5 + 1e-3


def test_only_ends_checked_is_only_ends_checked() -> None:
    """With one check a path may jump; more checks refuse the jump."""

    def jumps(checks: int) -> bool:
        problem = search_module.Problem(wall(0.05), point(1))
        settings_ = search_module.Settings(2, 10, checks, seeded(), None)
        scale = search_module.Scale(problem, 0, None)
        climb = search_module.Climb(problem, 0, 0.1, settings_, scale)
        return bool(climb.stays(torch.full((2, 1), 2.0, dtype=F64)).all())

    assert jumps(1)
    assert not jumps(8)


def test_checks_the_end_itself() -> None:
    problem = search_module.Problem(wall(0.05), point(1))
    settings_ = search_module.Settings(2, 10, 3, seeded(), None)
    climb = search_module.Climb(problem, 0, 0.1, settings_, search_module.Scale(problem, 0, None))
    assert not bool(climb.stays(torch.ones(2, 1, dtype=F64)).any())
    assert bool(climb.stays(torch.full((2, 1), 0.8, dtype=F64)).all())


def test_eps_bounds_both_sides() -> None:
    """The kept loss may not fall by more than eps either."""
    losses = [lambda x: x.sum(), lambda x: 10 * x.sum()]
    found = inconsistency_score(losses, point(1), 0.1, "search", generator=seeded())
    assert 0.99 <= float(found.values[0, 1]) <= 1.0 + 1e-9
    assert isinstance(found.witness, Tensor)


def test_losses_may_move_down() -> None:
    """The moved loss has its maximum at the point."""
    losses = [lambda x: x.square().sum(), lambda x: -4 * x.square().sum()]
    found = inconsistency_score(losses, point(2), 0.1, "search", generator=seeded())
    assert 0.39 <= float(found.values[0, 1]) <= 0.4 + 1e-9


def test_pushes_down_where_that_leads_farther() -> None:
    """Up is worth less than 1 on the edge, down more than 20, and no random direction is it."""
    axis = torch.nn.functional.normalize(torch.ones(12, dtype=F64), dim=0)
    losses = [lambda x: x.square().sum(), lambda x: 1 - (-10 * (axis @ x)).exp()]
    found = inconsistency_score(losses, point(12), 0.1, "search", generator=seeded())
    expected = np.exp(10 * 0.1**0.5) - 1
    assert 0.98 * expected <= float(found.values[0, 1]) <= expected * (1 + 1e-9)


def test_witness_is_that_of_its_pair() -> None:
    rng = np.random.default_rng(0)
    losses = quadratic_losses([np.eye(3), 2 * np.eye(3), random_spd(rng, 3) + 5 * np.eye(3)])
    found = inconsistency_score(losses, point(3), 0.1, "search", generator=seeded())
    assert found.environments == (0, 2)
    assert isinstance(found.witness, Tensor)
    assert float(losses[0](found.witness)) <= 0.1
    assert float(losses[2](found.witness)) == pytest.approx(float(found.score))


def test_infinity_in_a_loss_is_not_a_witness() -> None:
    losses = [lambda x: 0 * x.sum(), lambda x: x[0].exp()]
    found = inconsistency_score(losses, point(1), 0.1, "search", generator=seeded())
    assert np.isfinite(float(found.score))
    assert float(found.score) > 1e3


def test_losses_without_a_hessian() -> None:
    losses = [lambda x: x.abs().sum().sqrt() * 0 + x.abs().sum(), lambda x: 3 * x.abs().sum()]
    start = torch.full((2,), 0.5, dtype=F64)
    found = inconsistency_score(losses, start, 0.1, "search", generator=seeded())
    # 1 -> 3 at the point already; .9 <= kept <= 1.1
    assert float(found.values[0, 1]) == pytest.approx(3.3 - 1, rel=1e-3)


@pytest.mark.parametrize("limit", [2000, 10])
def test_infinite_curvature(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(search_module, "DENSE_LIMIT", limit)
    losses = [lambda x: x.abs().pow(1.5).sum(), lambda x: 3 * x.abs().pow(1.5).sum()]
    found = inconsistency_score(losses, point(40), 0.1, "search", steps=60, generator=seeded())
    assert 0.29 <= float(found.score) <= 0.3 * (1 + 1e-9)


def test_many_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond dense Hessians the most bent directions are found by Hessian-vector products."""
    monkeypatch.setattr(search_module, "DENSE_LIMIT", 100)
    rng = np.random.default_rng(0)
    hessians = [random_spd(rng, 200, 2.0) for _ in range(2)]
    for hessian in hessians:
        axes = rng.standard_normal((200, 5))
        hessian += 30 * axes @ axes.T
    losses = quadratic_losses(hessians)
    exact = inconsistency_score(losses, point(200), 0.01, "quadratic")
    found = inconsistency_score(losses, point(200), 0.01, "search", generator=seeded())
    assert 0.9 <= float(found.score / exact.score) <= 1 + 1e-9


def test_same_generator_same_result() -> None:
    losses, theta = patchwork(101)
    one, other = (
        inconsistency_score(losses, theta, 0.01, "search", steps=20, generator=seeded(4))
        for _ in range(2)
    )
    assert torch.equal(one.values.nan_to_num(), other.values.nan_to_num())


def test_progress_and_stop() -> None:
    losses = quadratic_losses([np.eye(2), 2 * np.eye(2), 3 * np.eye(2)])
    calls: list[tuple[int, int]] = []
    inconsistency_score(
        losses, point(2), 0.1, "search", steps=5, progress=lambda *done: calls.append(done)
    )
    assert calls == [(k, 15) for k in range(15)]
    found = inconsistency_score(
        losses, point(2), 0.1, "search", steps=5, progress=lambda done, total: done >= 7
    )
    assert "stopped by progress while losses[1] was kept" in repr(found)
    assert bool(found.values[2].isnan().all())
    assert float(found.score) > 0


def test_an_exception_in_progress_gets_out() -> None:
    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inconsistency_score(quadratic_losses([np.eye(2)] * 2), point(2), 1, "search", progress=fail)


def test_says_that_it_was_still_climbing() -> None:
    """The true score is infinite: it grows with the steps."""
    losses, theta = patchwork()
    found = inconsistency_score(losses, theta, 0.01, "search", steps=20, generator=seeded())
    assert any("still rising when the 20 steps ran out" in note for note in found.notes)
    assert "still rising" in repr(found)
    bowls = quadratic_losses(np.stack([np.eye(2), 3 * np.eye(2)]))
    done = inconsistency_score(bowls, point(2), 0.01, "search", generator=seeded())
    assert not any("rising" in note for note in done.notes)
