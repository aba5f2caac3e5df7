"""How many votes keep a coordinate."""

from __future__ import annotations

import math


def vote_threshold(tau: float, environments: int) -> int:
    """Return the smallest ``|votes|`` that keeps a coordinate.

    ``tau * environments`` is rounded up. The 1e-6 forgives the rounding of ``tau = k / d``, so
    that k votes of d are kept for every k. The kernels compute it in the same way.
    """
    return max(0, math.ceil(tau * environments - 1e-6))
