"""The number of votes that keeps a coordinate."""

from __future__ import annotations

import math


def vote_threshold(tau: float, environments: int) -> int:
    """Return the smallest ``|votes|`` that keeps a coordinate.

    ``tau * environments`` is rounded up. The tolerance of 1e-6 allows for the rounding of
    ``tau = k / d``, so k votes of d are kept for every k. The kernels compute the same number.
    """
    return max(0, math.ceil(tau * environments - 1e-6))
