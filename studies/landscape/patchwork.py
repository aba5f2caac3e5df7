"""The paper's patchwork example: a network that fits two environments with a part for each."""

from __future__ import annotations

import torch
from torch import Tensor

from .surfaces import Loss

# The paper's text and figure differ in the second number; with -45 the losses are what it says.
SOLUTION = (100.0, -45.0, 100.0, -75.0, 1.0, 1.0)
TURNED = (100.0, -45.0, 100.0, -75.0, 1.0, -0.5)  # the weight of the second unit, another way
ENVIRONMENTS = {"A": (0.0, 0.5), "B": (0.5, 1.0)}
POINTS = 501  # of each environment


def target(x: Tensor) -> Tensor:
    """Return the staircase with two steps that is to be learned."""
    return (10 * (x - 0.4)).clamp(0, 1) + (10 * (x - 0.7)).clamp(0, 1)


def network(theta: Tensor, x: Tensor) -> Tensor:
    r"""Return what the network makes of inputs.

    .. math:: f(x) = \theta_5 \sigma(\theta_1 x + \theta_2) + \theta_6 \sigma(\theta_3 x + \theta_4)
    """
    first = torch.sigmoid(theta[0] * x + theta[1])
    second = torch.sigmoid(theta[2] * x + theta[3])
    return theta[4] * first + theta[5] * second


def losses() -> list[Loss]:
    """Return the mean squared error of each environment, as a function of the parameters."""

    def loss_of(low: float, high: float) -> Loss:
        x = torch.linspace(low, high, POINTS, dtype=torch.float64)
        y = target(x)
        return lambda theta: (network(theta, x) - y).square().mean()

    return [loss_of(*bounds) for bounds in ENVIRONMENTS.values()]
