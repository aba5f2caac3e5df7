"""Optimizers that take gradients in environments.

One or more backward passes inside ``with optimizer.environment():`` for each environment, then
``optimizer.step()``. All are :class:`torch.optim.Optimizer` subclasses.
"""

from ._base import EnvironmentOptimizer
from .adam import AndMaskAdam, AndMaskAdamW
from .sgd import AndMaskSGD
from .temporal import TemporalAndMaskAdam
from .wrapper import EnvironmentWrapper

__all__ = [
    "AndMaskAdam",
    "AndMaskAdamW",
    "AndMaskSGD",
    "EnvironmentOptimizer",
    "EnvironmentWrapper",
    "TemporalAndMaskAdam",
]
