"""Losses on environments that were left out of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Environment = TypeVar("Environment")


@dataclass(frozen=True, eq=False, repr=False)
class LeftOut:
    """Losses of solutions that were each trained without one environment.

    Args:
        losses: row e is for the solution trained without environment e, column f for the loss on
            environment f. float64.
        held_out: the diagonal of ``losses``: the losses on the environments left out.
        training: the mean loss of each row on its training environments.
        gap: ``held_out - training``.
        solutions: the results of ``train``, one for each row.

    Shape:
        - losses: :math:`(d, d)`
        - held_out, training, gap: :math:`(d)`
    """

    losses: Tensor
    held_out: Tensor
    training: Tensor
    gap: Tensor
    solutions: tuple[Any, ...]

    @property
    def mean_gap(self) -> float:
        """The mean of ``gap`` over the environments left out."""
        return float(self.gap.mean())

    def __repr__(self) -> str:
        return (
            f"LeftOut {float(self.held_out.mean()):.6g} on environments left out, "
            f"{float(self.training.mean()):.6g} in training (gap {self.mean_gap:.6g}, "
            f"{len(self.gap)} environments)"
        )


def leave_one_environment_out(
    train: Callable[[list[Environment]], Any],
    environments: Sequence[Environment],
    evaluate: Callable[[Any, Environment], Tensor | float],
) -> LeftOut:
    r"""Train once without each environment, and evaluate each solution on all environments.

    Use it if the inconsistency score is infinite at every solution. The linear regression of the
    code released with the paper is an example. It has four examples of five numbers, and each is an
    environment. The Hessians have rank one and different null spaces, so every solution has an
    infinite score, even the invariant one. The loss on an example that was left out distinguishes
    them.

    Args:
        train: a function from a list of environments to a solution of any type.
        environments: at least 2 environments of any type.
        evaluate: a function from a solution and an environment to the loss, a number or a Tensor
            with one element.

    Returns:
        The table of losses, the losses on left-out and on training environments, and their gap.

    Raises:
        TypeError: an argument has the wrong type, or a loss is not a number.
        ValueError: there are fewer than 2 environments.

    Shape:
        - losses of the result: :math:`(d, d)`

    Example:
        >>> from andmask_ext.metrics import leave_one_environment_out
        >>> result = leave_one_environment_out(
        ...     train=lambda numbers: sum(numbers) / len(numbers),
        ...     environments=[1.0, 2.0, 6.0],
        ...     evaluate=lambda mean, number: abs(mean - number),
        ... )
        >>> result.held_out
        tensor([3.0000, 1.5000, 4.5000], dtype=torch.float64)
        >>> result
        LeftOut 3 on environments left out, 1.66667 in training (gap 1.33333, 3 environments)

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, and the
        linear regression in the code released with it.
    """
    for name, value in (("train", train), ("evaluate", evaluate)):
        if not callable(value):
            raise TypeError(f"{name}: expected a callable, but got {type(value).__name__}")
    if not isinstance(environments, Sequence):
        raise TypeError(f"environments: expected a sequence, but got {type(environments).__name__}")
    count = len(environments)
    if count < 2:
        raise ValueError(f"environments: expected at least 2, but got {count}")
    solutions, rows = [], []
    for left_out in range(count):
        solution = train([environments[e] for e in range(count) if e != left_out])
        solutions.append(solution)
        rows.append([_number(evaluate(solution, environment)) for environment in environments])
    losses = torch.tensor(rows, dtype=torch.float64, device="cpu")
    held_out = losses.diagonal().clone()
    training = losses.masked_fill(torch.eye(count, dtype=torch.bool, device="cpu"), 0.0).sum(1) / (
        count - 1
    )
    return LeftOut(losses, held_out, training, held_out - training, tuple(solutions))


def _number(value: object) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.detach())
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"evaluate: expected a number or a Tensor of one, but got {type(value).__name__}"
        ) from error
