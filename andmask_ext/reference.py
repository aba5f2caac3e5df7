"""The specification: every op again, in float64 and plain PyTorch, written to be read.

Tests compare the native ops with these functions; nothing else uses them. They return float64.

Reference:
    Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
"""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["agreement_mask", "masked_mean", "vote_threshold", "votes"]


def votes(grads: Tensor) -> Tensor:
    """Sum the signs of the environments: int64 ``[*shape]``. Zeros and NaN cast no vote."""
    return (grads > 0).sum(0) - (grads < 0).sum(0)


def vote_threshold(tau: float, environments: int) -> int:
    """Return the smallest ``|votes|`` that keeps a coordinate.

    ``tau * environments`` is rounded up; the 1e-6 forgives the rounding of ``tau = k / d``, so
    that exactly k votes of d are kept for every k.
    """
    return max(0, math.ceil(tau * environments - 1e-6))


def agreement_mask(grads: Tensor, tau: float = 1.0, rescale: bool = False) -> Tensor:
    """Return 1 where the environments agree, else 0; divided by its mean if ``rescale``."""
    mask = (votes(grads).abs() >= vote_threshold(tau, grads.shape[0])).double()
    if rescale and mask.numel() > 0:
        mask = mask / (1e-10 + mask.mean())
    return mask


def masked_mean(grads: Tensor, tau: float = 1.0, rescale: bool = False) -> Tensor:
    """Multiply the mean over environments by the mask: NaN and infinities come through."""
    return agreement_mask(grads, tau, rescale) * grads.double().mean(0)
