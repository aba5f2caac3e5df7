"""Consistency metrics: how far environments agree.

Metrics of gradients take stacked gradients ``[d, *shape]`` of d environments, as a tensor, a dict
or a list, or :class:`andmask_ext.Moments`. They return tensors or frozen dataclasses, and they do
not wait for a GPU. Metrics of solutions (inconsistency score, invariant learning consistency) take
losses and parameters.
"""

from ._alignment import GradientCorrelation, gradient_correlation, gradient_cosines
from ._diagnosis import diagnose
from ._input_agreement import InputAgreement, input_agreement
from ._monitor import Monitor
from ._signal import coherence, signal_to_noise
from ._thresholds import VoteThreshold, vote_threshold
from ._verdict import Diagnosis
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
    "Diagnosis",
    "GradientCorrelation",
    "HessianDiagonals",
    "HessianMeans",
    "Inconsistency",
    "InputAgreement",
    "LearningConsistency",
    "LeftOut",
    "Monitor",
    "TauCurve",
    "VoteHistogram",
    "VoteThreshold",
    "coherence",
    "diagnose",
    "gradient_correlation",
    "gradient_cosines",
    "hessian_diagonals",
    "hessian_means",
    "inconsistency_score",
    "input_agreement",
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
    "vote_threshold",
]
