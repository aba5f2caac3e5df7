"""Optimizers that take gradients in environments.

Run the backward pass of each environment inside ``with optimizer.environment():``. Then call
``optimizer.step()``. All are subclasses of :class:`torch.optim.Optimizer`.
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
