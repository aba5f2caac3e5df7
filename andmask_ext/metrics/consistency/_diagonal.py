"""Diagonals of Hessians, estimated by random probes, and the score of the diagonal model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._checks import check_count, check_generator
from ._problem import CHUNK, Params, Problem, draw_signs
from ._result import Inconsistency, best_pair, result

SURE = 3.0  # a curvature is significant if it is this many standard errors from zero


@dataclass(frozen=True, eq=False)
class HessianDiagonals:
    """Estimated diagonals of the environments' Hessians.

    Args:
        diagonals: one per environment, in the structure of the parameters.
        standard_errors: the standard errors of the diagonals, in the same structure. They are 0
            where all probes agree.
        probes: the number of probes of each estimate.

    Example:
        >>> import torch
        >>> from andmask_ext.metrics import hessian_diagonals
        >>> losses = [lambda x: x.square().sum(), lambda x: x.pow(4).sum()]
        >>> estimated = hessian_diagonals(losses, torch.ones(3), probes=4)
        >>> estimated.diagonals[1]
        tensor([12., 12., 12.])
    """

    diagonals: tuple[Params, ...]
    standard_errors: tuple[Params, ...]
    probes: int


def hessian_diagonals(
    losses: object,
    params: Params,
    *,
    probes: int = 64,
    generator: torch.Generator | None = None,
) -> HessianDiagonals:
    r"""Estimate the diagonals of the environments' Hessians from Hessian-vector products.

    The diagonal is the mean of :math:`v \odot H v` over random signs v. If H is diagonal, each
    probe gives it exactly. All environments use the same probes.

    Args:
        losses: one callable per environment, from the parameters to a 0-dim loss.
        params: a Tensor or a dict of Tensors, float32 or float64.
        probes: number of probes, at least 2. The standard error falls with its square root.
        generator: the generator of the probes; the default generator if None.

    Returns:
        The diagonals and their standard errors.

    Raises:
        TypeError: an argument has the wrong type, or ``params`` the wrong dtype.
        ValueError: there are fewer than 2 losses or probes, or a loss is not finite or not a
            function of the parameters alone.

    Example:
        >>> import torch
        >>> estimated = hessian_diagonals(
        ...     [lambda x: x[0] * x[1] + x[1].square()] * 2, torch.zeros(2), probes=1000
        ... )
        >>> error = (estimated.diagonals[0] - torch.tensor([0.0, 2.0])).abs()
        >>> bool((error < 5 * estimated.standard_errors[0]).all())
        True

    Reference:
        Hutchinson, *A stochastic estimator of the trace of the influence matrix*, 1989; Bekas,
        Kokiopoulou and Saad, *An estimator for the diagonal of a matrix*, 2007.
    """
    check_count("probes", probes, 2)
    check_generator(generator)
    problem = Problem(losses, params)
    means, errors = estimate(problem, probes, generator)
    back = problem.layout.unflatten
    dtype = problem.point.dtype
    return HessianDiagonals(
        tuple(back(row.to(dtype)) for row in means),
        tuple(back(row.to(dtype)) for row in errors),
        probes,
    )


def estimate(
    problem: Problem, probes: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return diagonals and standard errors, ``[d, n]`` in float64 on the parameters' device."""
    count, size = problem.environments, problem.size
    device = problem.point.device
    mean = torch.zeros(count, size, dtype=torch.float64, device=device)
    spread = torch.zeros_like(mean)  # sum of squared deviations (Chan's update)
    done = 0
    while done < probes:
        signs = draw_signs(problem, min(CHUNK, probes - done), generator)
        new, before = len(signs), done
        done += new
        for e in range(count):
            samples = (signs * problem.products(e, signs)).double()
            centre = samples.mean(0)
            delta = centre - mean[e]
            spread[e] += (samples - centre).square().sum(0) + delta.square() * (before * new / done)
            mean[e] += delta * (new / done)
    finite = mean.isfinite().all(1).tolist()
    if not all(finite):
        raise ValueError(
            f"losses[{finite.index(False)}]: the Hessian's diagonal at params is not finite"
        )
    return mean, (spread / (probes - 1) / probes).sqrt()


def diagonal(
    problem: Problem, eps: float, rtol: float, probes: int, generator: torch.Generator | None
) -> Inconsistency:
    """Score the diagonal model on the coordinates whose curvature is significant."""
    curvature, error = estimate(problem, probes, generator)
    count = problem.environments
    # Rounding errors of the products are relative to the largest curvature.
    floor = rtol * curvature.abs().amax(1, keepdim=True)
    seen = curvature > SURE * error + floor
    zero = (curvature.abs() <= floor) & (error <= floor)
    negative = curvature < -SURE * error - floor
    values = torch.full((count, count), math.nan, dtype=torch.float64, device="cpu")
    places: dict[tuple[int, int], tuple[int, float, float]] = {}
    for kept, moved in problem.pairs():
        usable = seen[kept] & (seen[moved] | zero[moved])
        ratio = curvature[moved].clamp(min=0) / curvature[kept]
        ratio = torch.where(usable, ratio, -torch.inf)
        ratio = torch.where(zero[kept] & seen[moved], torch.inf, ratio)
        place = int(ratio.argmax())
        best = float(ratio[place])
        if best == -math.inf:
            raise ValueError(
                f"probes: expected enough to see a significant curvature of losses[{kept}] and "
                f"losses[{moved}] at some coordinate, but got {probes}; use more probes"
            )
        gap = problem.start[moved] - problem.start[kept]
        values[kept, moved] = max(abs(gap), abs(gap + eps * best))
        noise = 0.0
        if 0 < best < math.inf:
            shares = error[[kept, moved], place] / curvature[[kept, moved], place]
            noise = eps * best * float(shares.norm())
        places[kept, moved] = place, best, noise
    pair = best_pair(values)
    place, best, noise = places[pair]
    direction = torch.zeros_like(problem.point)
    direction[place] = 1.0
    return result(
        problem,
        eps,
        values,
        "diagonal",
        "estimate",
        direction=direction,
        standard_error=noise,
        notes=_notes(problem, eps, curvature, seen, zero, negative),
    )


def _notes(
    problem: Problem, eps: float, curvature: Tensor, seen: Tensor, zero: Tensor, negative: Tensor
) -> tuple[str, ...]:
    notes = []
    for e in range(problem.environments):
        below = int(negative[e].sum())
        unsure = int((~(seen[e] | zero[e] | negative[e])).sum())
        if below or unsure:
            notes.append(
                f"losses[{e}]: of {problem.size} coordinates {below} left out for negative "
                f"curvature, {unsure} for curvature within {SURE:g} standard errors of zero"
            )
        gradient = problem.gradients(e, problem.point[None])[1][0].double()
        depth = float((gradient.square() / curvature[e])[seen[e]].sum()) / 2
        if depth > 1e-3 * eps:
            notes.append(
                f"losses[{e}]: its own minimum lies {depth:.2g} below params (eps is {eps:g})"
            )
    return tuple(notes)
