"""Descent on losses of two parameters: pure functions behind the pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Loss", "Rule", "check_losses", "descend", "evaluate"]

Loss: TypeAlias = Callable[[Tensor], Tensor]
Rule: TypeAlias = Callable[[Tensor], Tensor]


def check_losses(losses: Sequence[Loss]) -> list[Loss]:
    """Raise unless there are losses and each can be called."""
    if callable(losses) or not all(map(callable, losses)):
        raise TypeError("losses: expected a sequence of functions, one for each environment")
    if not losses:
        raise ValueError("losses: expected at least one, but got none")
    return list(losses)


def evaluate(loss: Loss, points: Tensor) -> Tensor:
    """Return a loss at many points: at all of them in one call if ``torch.vmap`` can.

    Args:
        loss: from a tensor [2] to a 0-dim one.
        points: where.

    Raises:
        ValueError: the loss does not return a 0-dim tensor.

    Shape:
        - points: :math:`(n, 2)`
        - output: :math:`(n)`
    """
    if not len(points):
        return points.new_empty(0)
    try:
        values = torch.vmap(loss)(points)
    except Exception:  # what vmap cannot do raises errors of all kinds; the loss may do for one
        values = torch.stack([torch.as_tensor(loss(point)) for point in points])
    if values.shape != points.shape[:1]:
        raise ValueError(
            f"losses: expected functions to 0-dim tensors, but got shape {list(values.shape[1:])}"
        )
    return values


def descend(
    losses: Sequence[Loss], starts: Tensor, rule: Rule, lr: float = 0.05, steps: int = 400
) -> Tensor:
    r"""Descend along aggregated gradients of the losses, from many starts at once.

    Args:
        losses: one for each environment, from a tensor [2] to a 0-dim one.
        starts: where to begin.
        rule: makes one update of stacked gradients ``[environments, 2]``, such as
            :class:`andmask_ext.rules.Mean` or :class:`andmask_ext.AndMask`; every start has
            its own.
        lr: step size.
        steps: how many.

    Returns:
        The paths, without a graph; the first point of each is its start.

    Raises:
        TypeError: ``losses`` are not functions, or ``starts`` not a floating-point tensor.
        ValueError: shapes are not as below, or ``steps`` is negative.

    Shape:
        - starts: :math:`(n, 2)`
        - output: :math:`(\text{steps} + 1, n, 2)`

    Example:
        >>> import torch, andmask_ext as am
        >>> from andmask_ext import plots
        >>> bowls = [lambda x: (x**2).sum(), lambda x: x[0] ** 2 + (x[1] - 2.0) ** 2]
        >>> starts = torch.tensor([[1.0, 0.5]])
        >>> plots.descend(bowls, starts, am.rules.Mean(), lr=0.5, steps=9)[-1]
        tensor([[0., 1.]])
        >>> plots.descend(bowls, starts, am.AndMask(tau=1.0), lr=0.5, steps=9)[-1]
        tensor([[0.0000, 0.5000]])
    """
    losses = check_losses(losses)
    if not isinstance(starts, Tensor) or not starts.is_floating_point():
        raise TypeError("starts: expected a floating-point Tensor")
    if starts.dim() != 2 or starts.shape[1] != 2:
        raise ValueError(f"starts: expected shape [n, 2], but got {list(starts.shape)}")
    if steps < 0:
        raise ValueError(f"steps: expected a number of steps, but got {steps}")
    points = starts.detach().clone()
    path = [points]
    for _ in range(steps):
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            grads = torch.stack([_gradient(evaluate(loss, points), points) for loss in losses])
        points = points.detach() - lr * _each(rule, grads)
        path.append(points)
    return torch.stack(path)


# ---- helpers ----


def _gradient(values: Tensor, points: Tensor) -> Tensor:
    """Return the gradient at each point; zero where the loss is constant."""
    if not values.requires_grad:
        return torch.zeros_like(points)
    (gradient,) = torch.autograd.grad(values.sum(), points, allow_unused=True)
    return torch.zeros_like(points) if gradient is None else gradient


def _each(rule: Rule, grads: Tensor) -> Tensor:
    """Apply a rule to the gradients ``[environments, n, 2]`` of each start on its own."""
    if not grads.shape[1]:
        return grads[0]
    try:
        return torch.vmap(rule, in_dims=1)(grads)
    except Exception:  # as above; rules that draw random numbers are among them
        return torch.stack([rule(one) for one in grads.unbind(1)])
