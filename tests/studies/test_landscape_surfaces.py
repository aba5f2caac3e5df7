"""The losses of the landscape study are what their description says, and descent descends."""

import pytest
import torch

pytest.importorskip("matplotlib")

import andmask_ext as am
from studies.landscape.parts import RULES
from studies.landscape.surfaces import LOSSES, POINTS, descend, quadratic

CONSISTENT, PATCHWORK = (torch.tensor(point, dtype=torch.float64) for point in POINTS.values())


def mean(theta):
    return sum(loss(theta) for loss in LOSSES) / 2


def near(points, place):
    return (points - place).norm(dim=1) < 0.05


@pytest.fixture(scope="module")
def starts():
    line = torch.linspace(-2.8, 2.8, 9, dtype=torch.float64)
    return torch.cartesian_prod(line, line)


def test_two_minima_of_the_mean_look_alike():
    for point in (CONSISTENT, PATCHWORK):
        assert mean(point) == pytest.approx(0.05)
        torch.testing.assert_close(torch.func.grad(mean)(point), torch.zeros(2).double())
    curvatures = [torch.func.hessian(mean)(point) for point in (CONSISTENT, PATCHWORK)]
    torch.testing.assert_close(*curvatures)
    assert torch.linalg.eigvalsh(curvatures[0]).min() > 0.5


def test_only_one_of_them_is_a_minimum_of_each_environment():
    for loss in LOSSES:
        hessian = torch.func.hessian(loss)
        assert torch.linalg.eigvalsh(hessian(CONSISTENT)).min() > 0.5
        lowest, highest = torch.linalg.eigvalsh(hessian(PATCHWORK))
        assert lowest < -0.01
        assert highest > 1


def test_around_the_patchwork_minimum_the_environments_contradict_each_other():
    near_by = PATCHWORK + 0.8 * (2 * torch.rand(500, 2).double() - 1)
    first, second = (torch.vmap(torch.func.grad(loss))(near_by) for loss in LOSSES)
    assert (first.sign() == -second.sign()).all()


def test_losses_are_positive_so_that_they_have_a_geometric_mean():
    points = 6 * torch.rand(2000, 2).double() - 3
    for loss in LOSSES:
        assert torch.vmap(loss)(points).min() > 0.02


def test_mean_descent_finds_both_minima_and_no_other(starts):
    ends = descend(LOSSES, starts, am.rules.Mean(), 0.2, 150)[-1]
    consistent, patchwork = near(ends, CONSISTENT), near(ends, PATCHWORK)
    assert (consistent | patchwork).all()
    assert 0.3 < patchwork.double().mean() < 0.7


def test_the_and_mask_finds_the_consistent_minimum_and_never_the_patchwork(starts):
    ends = descend(LOSSES, starts, am.AndMask(1.0), 0.2, 150)[-1]
    started, ended = ((one - PATCHWORK).abs().max(dim=1).values for one in (starts, ends))
    assert not ((ended < 0.5) & (started > 0.9)).any(), "it stays out of the contradiction"
    assert near(ends, CONSISTENT).double().mean() > 0.4


@pytest.mark.parametrize("rule", RULES)
def test_every_start_goes_its_own_way(rule):
    losses = [quadratic([[3.0, 1.0], [1.0, 1.0]]), quadratic([[1.0, -0.5], [-0.5, 2.0]])]
    starts = torch.tensor([[1.0, 2.0], [-2.0, 0.5], [0.0, -1.0]]).double()
    paths = descend(losses, starts, RULES[rule], 0.1, 30)
    assert paths.shape == (31, 3, 2)
    for number, theta in enumerate(starts):
        for point in paths[:, number]:
            torch.testing.assert_close(point, theta)
            grads = torch.stack([torch.func.grad(loss)(theta) for loss in losses])
            theta = theta - 0.1 * RULES[rule](grads)


def test_quadratics_have_their_hessians():
    hessian = torch.tensor([[4.0, 1.0], [1.0, 2.0]]).double()
    loss = quadratic(hessian.tolist())
    assert loss(torch.zeros(2).double()) == 0
    torch.testing.assert_close(torch.func.hessian(loss)(torch.rand(2).double()), hessian)
