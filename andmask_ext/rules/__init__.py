"""Rules: functions that aggregate the gradients of the environments to one update.

Importing this module registers the rules by :func:`torch.serialization.add_safe_globals`. So
checkpoints of optimizers load with ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import torch

from ._base import Rule
from ._conflicts import AgreementRandom, AgreementSum, SignDropout
from ._filtering import GradientAgreementFiltering
from ._masks import AndMask, FedILC, GeometricMean, MaskedAverage, SandMask
from ._means import Mean, Median, MedianOfThree, TrimmedMean, WinsorizedMean

__all__ = [
    "AgreementRandom",
    "AgreementSum",
    "AndMask",
    "FedILC",
    "GeometricMean",
    "GradientAgreementFiltering",
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
    _class.__module__ = __name__  # pickles store the public path of the class
    torch.serialization.add_safe_globals([_class])
