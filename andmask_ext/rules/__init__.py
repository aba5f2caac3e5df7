"""Rules: how the gradients of the environments become one update.

Importing this module allows the rules in ``torch.load(weights_only=True)``
(:func:`torch.serialization.add_safe_globals`), so that checkpoints of optimizers load.
"""

from __future__ import annotations

import torch

from ._base import Rule
from ._conflicts import AgreementRandom, AgreementSum, SignDropout
from ._masks import AndMask, FedILC, GeometricMean, MaskedAverage, SandMask
from ._means import Mean, Median, MedianOfThree, TrimmedMean, WinsorizedMean

__all__ = [
    "AgreementRandom",
    "AgreementSum",
    "AndMask",
    "FedILC",
    "GeometricMean",
    "MaskedAverage",
    "Mean",
    "Median",
    "MedianOfThree",
    "Rule",
    "SandMask",
    "SignDropout",
    "TrimmedMean",
    "WinsorizedMean",
]

for _name in __all__:
    _class = globals()[_name]
    _class.__module__ = __name__  # pickles name the public place, wherever the class is written
    torch.serialization.add_safe_globals([_class])
