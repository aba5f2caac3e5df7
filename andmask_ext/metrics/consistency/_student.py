"""Quantiles of Student's t, without scipy."""

from __future__ import annotations

import math


def student_cdf(t: float, freedom: int) -> float:
    """Return the chance that Student's t with ``freedom`` degrees is at most ``t``.

    For a whole number of degrees the integral is a finite sum: Abramowitz and Stegun, 26.7.3-4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(odd, freedom - 1, 2):  # powers of the cosine below freedom - 1
        total += term
        term *= square * (k + 1) / (k + 2)
    area = math.sin(angle) * total
    if odd:
        area = (angle + area) * 2 / math.pi
    return 0.5 + area / 2


def student_quantile(level: float, freedom: int) -> float:
    """Return the t that ``level`` of the mass lies within, on both sides together."""
    low, high = 0.0, 1.0
    target = 0.5 + level / 2
    while student_cdf(high, freedom) < target:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if student_cdf(middle, freedom) < target:
            low = middle
        else:
            high = middle
    return high
