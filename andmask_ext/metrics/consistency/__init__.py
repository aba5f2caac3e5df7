"""Invariant learning consistency: how far environments agree about a solution."""

from __future__ import annotations

from ._diagonal import HessianDiagonals, hessian_diagonals
from ._ilc import LearningConsistency, invariant_learning_consistency
from ._left_out import LeftOut, leave_one_environment_out
from ._means import HessianMeans, hessian_means
from ._models import model_losses
from ._result import Inconsistency
from ._score import inconsistency_score

__all__ = [
    "HessianDiagonals",
    "HessianMeans",
    "Inconsistency",
    "LearningConsistency",
    "LeftOut",
    "hessian_diagonals",
    "hessian_means",
    "inconsistency_score",
    "invariant_learning_consistency",
    "leave_one_environment_out",
    "model_losses",
]
