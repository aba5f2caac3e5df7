"""Extremes of a quadratic function on a shell about the origin, given in its eigenbasis.

The function is sum_i (curvature_i x_i^2 / 2 + slope_i x_i). On a sphere this is the problem of the
trust region: More and Sorensen, *Computing a trust region step*, 1983.
"""

from __future__ import annotations

import torch
from torch import Tensor


def evaluate(curvature: Tensor, slope: Tensor, x: Tensor) -> float:
    """Return the function's value at ``x``."""
    return float((curvature * x.square() / 2 + slope * x).sum())


def largest_on_sphere(curvature: Tensor, slope: Tensor, radius: float) -> Tensor:
    """Return the point of the sphere at which the function is largest.

    There x_i = slope_i / (mu + top - curvature_i) for a mu >= 0 that gives x its length; where the
    slope has no part along the top curvature, mu is 0 and that part of x fills up the length.
    """
    if radius == 0.0:
        return torch.zeros_like(slope)
    top = int(curvature.argmax())
    below = curvature[top] - curvature
    size = float(slope.norm())
    lowest = float(slope[below == 0].norm()) / radius

    def at(mu: float) -> Tensor:
        return torch.where(slope == 0, 0.0, slope / (mu + below))

    if lowest == 0.0:
        x = at(0.0)
        missing = radius**2 - float(x.square().sum())
        if missing >= 0:
            x[top] = missing**0.5
            return x
    # x shrinks as mu grows: bisection of log(mu) between ends at which x is too long and too short
    low, high = max(lowest, size / radius * 1e-200), size / radius
    for _ in range(200):
        middle = (low * high) ** 0.5 if low * high > 0 else (low + high) / 2
        if middle in (low, high):
            break
        if float(at(middle).norm()) > radius:
            low = middle
        else:
            high = middle
    x = at(high)
    return x * (radius / float(x.norm()))


def largest_on_shell(
    curvature: Tensor, slope: Tensor, inner: float, outer: float, side: Tensor
) -> tuple[float, Tensor]:
    """Return the function's largest value for inner <= ``|x|`` <= outer, and a point that has it.

    In one dimension a shell with a hole is two intervals; only that on the side of the point
    ``side`` counts.
    """
    if len(slope) == 0:
        return 0.0, slope.clone()
    candidates = []
    if len(slope) == 1 and inner > 0:
        sign = 1.0 if float(side) >= 0 else -1.0
        candidates += [torch.full_like(slope, sign * inner), torch.full_like(slope, sign * outer)]
    else:
        candidates.append(largest_on_sphere(curvature, slope, outer))
        if inner > 0:
            candidates.append(largest_on_sphere(curvature, slope, inner))
    if bool((curvature < 0).all()):
        peak = -slope / curvature
        same_side = len(slope) > 1 or inner == 0 or bool((peak * side >= 0).all())
        if inner <= float(peak.norm()) <= outer and same_side:
            candidates.append(peak)
    best = max(candidates, key=lambda x: evaluate(curvature, slope, x))
    return evaluate(curvature, slope, best), best
