"""The losses to look at are what their descriptions say."""

import pytest
import torch

import andmask_ext
from andmask_ext import plots
from andmask_ext.metrics import landscapes


def at(point):
    return torch.tensor(point, dtype=torch.float64)


@pytest.fixture(scope="module")
def ends():
    """Where 81 starts end up: along the mean gradient, and along the AND-mask."""
    line = torch.linspace(-2.8, 2.8, 9, dtype=torch.float64)
    starts = torch.cartesian_prod(line, line)
    losses = landscapes.two_minima().losses
    rules = (andmask_ext.rules.Mean(), andmask_ext.AndMask(1.0))
    return {"starts": starts} | {
        type(rule).__name__: plots.descend(losses, starts, rule, lr=0.2, steps=150)[-1]
        for rule in rules
    }


def near(points, place):
    return (points - at(place)).norm(dim=1) < 0.05


def test_two_minima_of_the_mean_look_alike():
    example = landscapes.two_minima()
    consistent, patchwork = (at(point) for point in example.points.values())

    def mean(theta):
        return sum(loss(theta) for loss in example.losses) / 2

    for point in (consistent, patchwork):
        assert mean(point) == pytest.approx(0.05)
        torch.testing.assert_close(torch.func.grad(mean)(point), torch.zeros(2).double())
    torch.testing.assert_close(
        torch.func.hessian(mean)(consistent), torch.func.hessian(mean)(patchwork)
    )
    assert torch.linalg.eigvalsh(torch.func.hessian(mean)(consistent)).min() > 0.5


def test_only_one_of_them_is_a_minimum_of_each_environment():
    example = landscapes.two_minima()
    for loss in example.losses:
        hessian = torch.func.hessian(loss)
        assert torch.linalg.eigvalsh(hessian(at(example.points["consistent"]))).min() > 0.5
        lowest, highest = torch.linalg.eigvalsh(hessian(at(example.points["patchwork"])))
        assert lowest < -0.01
        assert highest > 1


def test_around_the_patchwork_minimum_the_environments_contradict_each_other():
    example = landscapes.two_minima()
    near_by = at(example.points["patchwork"]) + 0.8 * (2 * torch.rand(500, 2).double() - 1)
    first, second = (torch.vmap(torch.func.grad(loss))(near_by) for loss in example.losses)
    assert (first.sign() == -second.sign()).all()


def test_mean_descent_finds_both_minima_and_no_other(ends):
    points = landscapes.two_minima().points
    consistent, patchwork = (near(ends["Mean"], point) for point in points.values())
    assert (consistent | patchwork).all()
    assert 0.3 < patchwork.double().mean() < 0.7


def test_the_and_mask_finds_the_consistent_minimum_and_never_the_patchwork(ends):
    points = landscapes.two_minima().points
    started, ended = (
        (one - at(points["patchwork"])).abs().max(dim=1).values
        for one in (ends["starts"], ends["AndMask"])
    )
    assert not ((ended < 0.5) & (started > 0.9)).any(), "it stays out of the contradiction"
    assert near(ends["AndMask"], points["consistent"]).double().mean() > 0.4


def test_from_the_same_start_the_mask_leads_to_the_consistent_and_the_mean_to_the_patchwork():
    example, start = landscapes.two_minima(), torch.tensor([[-1.2, -1.6]]).double()
    mean, masked = (
        plots.descend(example.losses, start, rule, lr=0.05, steps=400)[-1]
        for rule in (andmask_ext.rules.Mean(), andmask_ext.AndMask(1.0))
    )
    assert near(mean, example.points["patchwork"])
    assert near(masked, example.points["consistent"])


def test_losses_are_positive_so_that_they_have_a_geometric_mean():
    example = landscapes.two_minima()
    points = 6 * torch.rand(2000, 2).double() - 3
    for loss in example.losses:
        assert torch.vmap(loss)(points).min() > 0.02


def test_quadratics_have_their_hessians_and_their_center():
    hessians = torch.tensor([[[4.0, 1.0], [1.0, 2.0]], [[1.0, 0.0], [0.0, 9.0]]]).double()
    example = landscapes.quadratics(hessians, (1.0, -2.0))
    assert example.points == {"minimum": (1.0, -2.0)}
    for loss, hessian in zip(example.losses, hessians, strict=True):
        assert loss(at((1.0, -2.0))) == 0
        torch.testing.assert_close(torch.func.hessian(loss)(torch.rand(2).double()), hessian)
    left, right, low, high = example.bounds
    assert left < 1 < right
    assert low < -2 < high


def test_example_errors():
    with pytest.raises(ValueError, match=r"slope: expected 0 < slope < floor = 0.05, but got 0.1"):
        landscapes.two_minima(slope=0.1)
    with pytest.raises(ValueError, match="steepness: expected more than"):
        landscapes.two_minima(steepness=0.05)
    with pytest.raises(ValueError, match=r"hessians: expected shape \[d >= 1, 2, 2\], but got \[2"):
        landscapes.quadratics(torch.eye(2))
    with pytest.raises(ValueError, match="hessians: expected symmetric"):
        landscapes.quadratics([[[1.0, 2.0], [0.0, 1.0]]])
