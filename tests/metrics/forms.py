"""The forms in which gradients may come to a metric, and how results come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import andmask_ext as am

KINDS = ("votes", "squares")


def as_moments(parameters: list[Tensor]) -> am.Moments:
    moments = am.Moments([grads[0] for grads in parameters], KINDS)
    moments.add_stacked(parameters)
    return moments


# Of a list of stacked gradients, the same in another form.
FORMS: dict[str, Callable[[list[Tensor]], Any]] = {
    "list": list,
    "tuple": tuple,
    "dict": lambda parameters: {f"p{i}": grads for i, grads in enumerate(parameters)},
    "moments": as_moments,
}


def in_order(result: Any) -> list[Tensor]:
    """Return results as a list, whatever form they came in."""
    return list(result.values()) if isinstance(result, dict) else list(result)


def parameters(environments: int = 6, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Stacked gradients of three parameters, with zeros among them."""
    shapes = [(7, 5), (11,), ()]
    drawn = [torch.randn(environments, *shape, dtype=torch.float64) + 0.3 for shape in shapes]
    return [torch.where(torch.rand_like(one) < 0.1, 0.0, one).to(dtype) for one in drawn]
