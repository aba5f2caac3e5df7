"""Optimizers of this package inside the wrappers of training frameworks."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ._base import EnvironmentOptimizer


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer of this package that a framework has wrapped.

    Lightning, Fabric and Accelerate keep it in an attribute. What wraps none is returned as it is.

    Args:
        optimizer: any object.
    """
    inner, seen = optimizer, set()
    while id(inner) not in seen:
        seen.add(id(inner))
        own = getattr(inner, "__dict__", {})
        if isinstance(inner, EnvironmentOptimizer) and "_pending" in own:  # no wrapper's subclass
            return inner
        inner = own.get("_optimizer", own.get("optimizer"))
        if not isinstance(inner, Optimizer):
            break
    return optimizer
