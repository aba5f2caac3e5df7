"""Paths of descent."""

import pytest
import torch

import andmask_ext
from andmask_ext import plots
from andmask_ext.metrics import landscapes

BOWLS = landscapes.quadratics([[[3.0, 1.0], [1.0, 1.0]], [[1.0, -0.5], [-0.5, 2.0]]]).losses
STARTS = torch.tensor([[1.0, 2.0], [-2.0, 0.5], [0.0, -1.0]]).double()


def by_hand(rule, start, steps, lr):
    theta, path = start.clone(), [start]
    for _ in range(steps):
        grads = torch.stack([torch.func.grad(loss)(theta) for loss in BOWLS])
        theta = theta - lr * rule(grads)
        path.append(theta)
    return torch.stack(path)


@pytest.mark.parametrize(
    "rule",
    [
        andmask_ext.rules.Mean(),
        andmask_ext.AndMask(1.0),
        andmask_ext.AndMask(1.0, rescale=True),
        andmask_ext.rules.GeometricMean(0.5),
        lambda grads: grads.median(0).values,
    ],
    ids=["mean", "and-mask", "rescaled", "geometric", "any function"],
)
def test_every_start_goes_its_own_way(rule):
    paths = plots.descend(BOWLS, STARTS, rule, lr=0.1, steps=30)
    assert paths.shape == (31, 3, 2)
    for number, start in enumerate(STARTS):
        torch.testing.assert_close(paths[:, number], by_hand(rule, start, 30, 0.1))


def test_the_mean_gradient_ends_at_the_minimum_of_the_mean():
    paths = plots.descend(BOWLS, STARTS, andmask_ext.rules.Mean(), lr=0.3, steps=200)
    torch.testing.assert_close(paths[-1], torch.zeros(3, 2).double())


def test_functions_that_vmap_cannot_map_are_called_point_by_point():
    def branching(theta):
        return theta[0] ** 2 if theta[0] > 0 else 3 * theta[0] ** 2

    def mapped(theta):
        return torch.where(theta[0] > 0, theta[0] ** 2, 3 * theta[0] ** 2)

    paths = [
        plots.descend([loss], STARTS, andmask_ext.rules.Mean(), 0.1, 5)
        for loss in (branching, mapped)
    ]
    torch.testing.assert_close(*paths)


def test_a_rule_with_random_numbers():
    def noisy(grads):
        return grads.mean(0) + torch.randn(2)

    paths = plots.descend(BOWLS, STARTS, noisy, lr=0.1, steps=3)
    assert len(paths[-1].unique()) == 6


@pytest.mark.parametrize("loss", [lambda x: torch.tensor(2.0), lambda x: 0 * x.sum().detach()])
def test_a_constant_loss_moves_nothing(loss):
    paths = plots.descend([loss], STARTS, andmask_ext.rules.Mean(), steps=2)
    torch.testing.assert_close(paths[-1], STARTS)


def test_under_no_grad_and_from_starts_in_a_graph():
    starts = STARTS.clone().requires_grad_()
    with torch.no_grad():
        paths = plots.descend(BOWLS, starts, andmask_ext.rules.Mean(), steps=2)
    assert not paths.requires_grad
    assert starts.grad is None
    assert not torch.equal(paths[0], paths[-1])


def test_no_steps_and_no_starts():
    assert torch.equal(plots.descend(BOWLS, STARTS, andmask_ext.rules.Mean(), steps=0)[0], STARTS)
    assert plots.descend(BOWLS, STARTS[:0], andmask_ext.rules.Mean(), steps=4).shape == (5, 0, 2)


def test_divergence_is_in_the_path():
    paths = plots.descend(BOWLS, STARTS.float(), andmask_ext.rules.Mean(), lr=1e30, steps=4)
    assert not paths[-1].isfinite().any()


def test_descent_errors():
    rule = andmask_ext.rules.Mean()
    with pytest.raises(TypeError, match="losses: expected a sequence of functions"):
        plots.descend(BOWLS[0], STARTS, rule)
    with pytest.raises(TypeError, match="losses: expected a sequence of functions"):
        plots.descend([BOWLS[0], 3], STARTS, rule)
    with pytest.raises(ValueError, match="losses: expected at least one"):
        plots.descend([], STARTS, rule)
    with pytest.raises(TypeError, match="starts: expected a floating-point Tensor"):
        plots.descend(BOWLS, torch.ones(1, 2, dtype=torch.int64), rule)
    with pytest.raises(ValueError, match=r"starts: expected shape \[n, 2\], but got \[2\]"):
        plots.descend(BOWLS, STARTS[0], rule)
    with pytest.raises(ValueError, match="steps: expected a number of steps, but got -1"):
        plots.descend(BOWLS, STARTS, rule, steps=-1)
    with pytest.raises(ValueError, match=r"functions to 0-dim tensors, but got shape \[2\]"):
        plots.descend([lambda x: x], STARTS, rule)
    with pytest.raises(ZeroDivisionError):  # the loss's own error, not one of mapping it
        plots.descend([lambda x: x.sum() * (1 // 0)], STARTS, rule)
