"""Training without one environment after the other, on the linear regression of the authors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import andmask_ext as am
from andmask_ext.metrics.consistency import inconsistency_score, leave_one_environment_out


def regression() -> list[tuple[Tensor, Tensor]]:
    """Four environments of one example each: its own feature, and a small one that all share."""
    rows = 3 * torch.cat([torch.eye(4), 0.1 * torch.ones(4, 1)], dim=1).double()
    return [(row, torch.ones((), dtype=torch.float64)) for row in rows]


def loss(theta: Tensor, environment: tuple[Tensor, Tensor]) -> Tensor:
    x, y = environment
    return (x @ theta - y).square()


def train(rule: am.rules.Rule, steps: int) -> object:
    def run(environments: list[tuple[Tensor, Tensor]]) -> Tensor:
        theta, rate = torch.zeros(5, dtype=torch.float64), 0.05
        for _ in range(steps):
            grads = torch.stack([2 * (x @ theta - y) * x for x, y in environments])
            theta = theta - rate * rule(grads) - rate * 0.01 * theta
        return theta

    return run


def test_tells_the_rules_apart_on_the_linear_regression() -> None:
    environments = regression()
    mean = leave_one_environment_out(train(am.rules.Mean(), 1000), environments, loss)
    masked = leave_one_environment_out(train(am.AndMask(1.0), 3000), environments, loss)
    assert float(mean.training.max()) < 1e-3
    assert float(mean.held_out.min()) > 0.5  # what is memorised says nothing of another
    assert float(masked.held_out.max()) < 0.05
    assert masked.mean_gap < 0.01 < 0.5 < mean.mean_gap


def test_scores_of_the_linear_regression_are_infinite() -> None:
    """Why: every Hessian has rank one, so each rule's solution looks the same."""
    environments = regression()
    invariant = torch.tensor([0, 0, 0, 0, 1 / 0.3], dtype=torch.float64)
    patchwork = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1 / 3, 0], dtype=torch.float64)
    losses = [lambda theta, e=e: loss(theta, e) for e in environments]
    for theta in (invariant, patchwork):
        assert float(losses[0](theta)) < 1e-14
        found = inconsistency_score(losses, theta, 0.01)
        assert (float(found.score), found.bound) == (math.inf, "exact")


def test_table() -> None:
    table = [[1.0, 2.0, 6.0], [4.0, 9.0, 0.0], [5.0, 7.0, 3.0]]
    seen = []

    def note(environments: list[int]) -> int:
        seen.append(list(environments))
        return ({0, 1, 2} - set(environments)).pop()

    found = leave_one_environment_out(note, (0, 1, 2), lambda row, e: table[row][e])
    assert seen == [[1, 2], [0, 2], [0, 1]]
    assert found.losses.tolist() == table
    assert found.held_out.tolist() == [1.0, 9.0, 3.0]
    assert found.training.tolist() == [4.0, 2.0, 6.0]
    assert found.gap.tolist() == [-3.0, 7.0, -3.0]
    assert found.mean_gap == pytest.approx(1 / 3)
    assert found.solutions == (0, 1, 2)
    assert repr(found).startswith("LeftOut 4.33333 on environments left out, 4 in training")


def test_infinite_losses_stay_where_they_are() -> None:
    found = leave_one_environment_out(
        lambda rest: 0, [0, 1, 2], lambda _, e: math.inf if e == 1 else torch.tensor(1.0)
    )
    assert found.held_out.tolist() == [1.0, math.inf, 1.0]
    assert found.training.tolist() == [math.inf, 1.0, math.inf]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((3, [1, 2], len), TypeError, "train: expected a callable, but got int"),
        ((len, [1, 2], 3), TypeError, "evaluate: expected a callable, but got int"),
        ((len, 3, len), TypeError, "environments: expected a sequence, but got int"),
        ((len, [1], len), ValueError, "environments: expected at least 2, but got 1"),
        (
            (len, [1, 2], lambda s, e: None),
            TypeError,
            "a number or a Tensor of one, but got None",
        ),
        (
            (len, [1, 2], lambda s, e: torch.ones(2)),
            TypeError,
            "evaluate: expected a number or a Tensor of one, but got Tensor",
        ),
    ],
)
def test_errors(arguments: tuple[object, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        leave_one_environment_out(*arguments)  # type: ignore[arg-type]
