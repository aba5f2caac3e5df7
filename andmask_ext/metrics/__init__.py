"""Consistency metrics: what environments agree on, and how far.

Metrics of gradients take those of environments, stacked as ``[d, *shape]``, in a tensor, a dict or
a list, or :class:`andmask_ext.Moments`; and return 0-dim tensors or small frozen dataclasses.
Nothing waits for a GPU. Metrics of solutions (inconsistency score, invariant learning consistency)
take losses and parameters.
"""

from ._alignment import GradientCorrelation, gradient_correlation, gradient_cosines
from ._monitor import Monitor
from ._signal import coherence, signal_to_noise
from ._votes import (
    TauCurve,
    VoteHistogram,
    kept_fraction,
    noise_kept_fraction,
    noise_kept_probability,
    noise_votes,
    sign_agreement,
    tau_curve,
    vote_histogram,
)
from .consistency import (
    HessianDiagonals,
    HessianMeans,
    Inconsistency,
    LearningConsistency,
    LeftOut,
    hessian_diagonals,
    hessian_means,
    inconsistency_score,
    invariant_learning_consistency,
    leave_one_environment_out,
    model_losses,
)

__all__ = [
    "GradientCorrelation",
    "HessianDiagonals",
    "HessianMeans",
    "Inconsistency",
    "LearningConsistency",
    "LeftOut",
    "Monitor",
    "TauCurve",
    "VoteHistogram",
    "coherence",
    "gradient_correlation",
    "gradient_cosines",
    "hessian_diagonals",
    "hessian_means",
    "inconsistency_score",
    "invariant_learning_consistency",
    "kept_fraction",
    "leave_one_environment_out",
    "model_losses",
    "noise_kept_fraction",
    "noise_kept_probability",
    "noise_votes",
    "sign_agreement",
    "signal_to_noise",
    "tau_curve",
    "vote_histogram",
]
