"""Consistency metrics: what environments agree on, and how far.

They take the gradients of environments, stacked as ``[d, *shape]``, in a tensor, a dict or a list,
or :class:`andmask_ext.Moments`; and return 0-dim tensors or small frozen dataclasses. Nothing waits
for a GPU.
"""

from . import landscapes
from ._alignment import GradientCorrelation, gradient_correlation, gradient_cosines
from ._monitor import Monitor
from ._signal import coherence, signal_to_noise
from ._votes import (
    TauCurve,
    VoteHistogram,
    kept_fraction,
    noise_kept_fraction,
    noise_votes,
    sign_agreement,
    tau_curve,
    vote_histogram,
)

__all__ = [
    "GradientCorrelation",
    "Monitor",
    "TauCurve",
    "VoteHistogram",
    "coherence",
    "gradient_correlation",
    "gradient_cosines",
    "kept_fraction",
    "landscapes",
    "noise_kept_fraction",
    "noise_votes",
    "sign_agreement",
    "signal_to_noise",
    "tau_curve",
    "vote_histogram",
]
