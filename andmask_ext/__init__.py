"""The AND-mask for PyTorch: updates that all environments agree on.

Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021.
"""

from ._library import __version__, build_info  # isort: skip  # loads the ops that others use
from . import _fake as _fake
from . import integrations, metrics, nn, ops, optim, rules
from ._backward import backward
from .agreement import Agreement
from .moments import Moments
from .rules import AndMask

__all__ = [
    "Agreement",
    "AndMask",
    "Moments",
    "__version__",
    "backward",
    "build_info",
    "integrations",
    "metrics",
    "nn",
    "ops",
    "optim",
    "rules",
]
