"""Clipping of the aggregated gradient by its total norm, without writing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._pending import PendingStep
from ._checks import as_number
from ._updates import Arguments


def check_max_norm(value: Any) -> float | None:
    """Return a largest norm as a float, or None. Raise unless it is a number above 0.

    ``torch.nn.utils.clip_grad_norm_`` takes 0, too, and makes all gradients zero. Other programs
    mean no clipping by 0.
    """
    if value is None:
        return None
    number = float(as_number("max_norm", value))
    if not number > 0:
        raise ValueError(
            f"max_norm: expected a number above 0, but got {number:g}; None does not clip"
        )
    return number


class ClipsNorm:
    """The part of an optimizer that knows the largest norm and the last one.

    Attributes:
        grad_norm: the norm in the last step, before clipping: 0-dim float64. None before the first
            step, and without ``max_norm``.
    """

    # No values in the class: wrappers of frameworks derive from it, and look here first.
    grad_norm: Tensor | None
    _max_norm: float | None
    _pending: PendingStep

    @property
    def max_norm(self) -> float | None:
        """The largest total norm of the aggregated gradient; None: it is not clipped."""
        return self._max_norm

    @max_norm.setter
    def max_norm(self, value: float | None) -> None:
        owner = self._pending.owner  # the optimizer itself, should this be a wrapper of it
        owner._max_norm = check_max_norm(value)  # type: ignore[attr-defined]

    def _clip(self, updates: Sequence[Arguments]) -> Tensor | None:
        """Set ``grad_norm``. Return the factor of all gradients, 0-dim float64; None: 1.

        Args:
            updates: the aggregated gradients, in groups of at least one.
        """
        if self._max_norm is None:
            self.grad_norm = None
            return None
        squares = [torch.ops.andmask._squared_norm.default(*update) for update in updates]
        total = squares[0] if squares else torch.zeros((), dtype=torch.float64)
        for square in squares[1:]:  # one after the other: the order of sum() is the processor's
            total = total + square.to(total.device)
        self.grad_norm = total.sqrt()
        if self._max_norm == float("inf"):
            return None
        # As in torch.nn.utils.clip_grad_norm_. The host does not wait for the norm.
        return (self._max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
