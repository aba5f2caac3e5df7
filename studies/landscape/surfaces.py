"""Losses of two parameters in two environments, and descent on them.

``LOSSES`` have a mean with two global minima, of which they share one. At the *consistent* minimum
both environments have the same round bowl. At the *patchwork* minimum each has a valley, across the
other's, whose bottom falls off a little towards both ends: alone it has a pass there, and no
minimum. Only their mean has one, and it looks exactly like the other: the same loss, the same
curvature. Around it the two gradients have opposite signs in both coordinates.

In the spirit of figure 1 of Parascandolo et al., ICLR 2021; the formula is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# From a point [2] to a 0-dim tensor; Any, so that it is a loss to andmask_ext.metrics as well.
Loss = Callable[[Any], Tensor]
Rule = Callable[[Tensor], Tensor]

POINTS = {"consistent": (-1.3, 1.3), "patchwork": (1.3, -1.3)}
BOUNDS = (-3.0, 3.0, -3.0, 3.0)  # of the first parameter, then of the second

FLOOR, SLOPE, STEEPNESS = 0.05, 0.02, 2.0  # loss at both minima, fall of a valley, curvature across
HALF, BLEND = 0.9, 0.15  # length of a valley to either side; width of ridges between basins
BOWL = (STEEPNESS - 4 * SLOPE / HALF**2) / 2  # the mean's curvature at the crossing


def _loss(across: int) -> Loss:
    """Return the loss whose valley is narrow in one of the two parameters."""

    def loss(theta: Tensor) -> Tensor:
        consistent, patchwork = POINTS["consistent"], POINTS["patchwork"]
        x, y = theta[0] - consistent[0], theta[1] - consistent[1]
        shared = FLOOR + BOWL / 2 * (x * x + y * y)
        side = theta[across] - patchwork[across]
        along = (theta[1 - across] - patchwork[1 - across]) / HALF
        inside = SLOPE * ((along * along - 1) ** 2 - 1)
        bottom = torch.where(along.abs() < 1, inside, (along.abs() - 1) ** 2 - SLOPE)
        valley = FLOOR + STEEPNESS / 2 * side * side + bottom
        return -BLEND * torch.logaddexp(-shared / BLEND, -valley / BLEND)

    return loss


LOSSES: Sequence[Loss] = (_loss(0), _loss(1))


def quadratic(hessian: Sequence[Sequence[float]]) -> Loss:
    """Return the quadratic loss with this Hessian and its minimum at zero."""
    (xx, xy), (_, yy) = hessian

    def loss(theta: Tensor) -> Tensor:
        x, y = theta[0], theta[1]
        return (xx * x * x + 2 * xy * x * y + yy * y * y) / 2

    return loss


def descend(losses: Sequence[Loss], starts: Tensor, rule: Rule, lr: float, steps: int) -> Tensor:
    """Descend along what a rule makes of the gradients, from each of the starts ``[n, 2]``.

    Returns the paths ``[steps + 1, n, 2]``; the first point of each is its start.
    """
    path = [starts]
    for _ in range(steps):
        points = path[-1].detach().requires_grad_()
        grads = torch.stack(
            [torch.autograd.grad(torch.vmap(loss)(points).sum(), points)[0] for loss in losses]
        )
        path.append(points.detach() - lr * torch.vmap(rule, in_dims=1)(grads))
    return torch.stack(path)
