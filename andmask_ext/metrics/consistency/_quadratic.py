"""The exact score of the quadratic model, from dense Hessians in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._problem import Problem
from ._result import Inconsistency, best_pair, result

DENSE_LIMIT = 1000  # the largest number of parameters for dense Hessians
FAR_OUT = torch.tensor([[1.0], [-1.0], [10.0], [100.0]], dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Model:
    """Second-order model of one environment's loss at the point: value, gradient, Hessian.

    ``whitening`` [n, r] satisfies whitening.T @ hessian @ whitening = 1. ``flat`` [n, n - r] spans
    the directions without curvature.
    """

    value: float
    gradient: Tensor
    hessian: Tensor
    top: float
    whitening: Tensor
    flat: Tensor

    def change(self, step: Tensor) -> float:
        """Return the change of the model's value after ``step``."""
        return float(self.gradient @ step + step @ (self.hessian @ step) / 2)


@dataclass(frozen=True)
class Extreme:
    """The largest change for one pair: its value and step, or the direction if it is infinite."""

    value: float
    step: Tensor | None
    direction: Tensor


def default_rtol(dtype: torch.dtype) -> float:
    """Return the relative curvature below which rounding hides it."""
    return float(torch.finfo(dtype).eps ** (2 / 3))


def not_a_minimum(environment: int, why: str) -> ValueError:
    """Return the error for a point where the quadratic model has no bounded level set."""
    return ValueError(
        f"params: expected a minimum of every environment's quadratic model, but {why} for "
        f"losses[{environment}]; method='search' needs no minimum"
    )


def make_model(problem: Problem, environment: int, rtol: float) -> Model:
    """Return one environment's model. Raise if the point is no minimum of it."""
    hessian, gradient = problem.hessian(environment), problem.gradient(environment)
    if not bool(hessian.isfinite().all()):
        raise ValueError(f"losses[{environment}]: the Hessian at params is not finite")
    curvature, basis = torch.linalg.eigh(hessian)
    top, bottom = float(curvature[-1]), float(curvature[0])
    largest = max(abs(top), abs(bottom))
    if bottom < -rtol * largest:
        raise not_a_minimum(
            environment, f"the Hessian's smallest eigenvalue is {bottom:.4g} (largest {top:.4g})"
        )
    curved = curvature > rtol * largest
    return Model(
        value=problem.start[environment],
        gradient=gradient,
        hessian=hessian,
        top=largest,
        whitening=basis[:, curved] / curvature[curved].sqrt(),
        flat=basis[:, ~curved],
    )


def extreme(
    kept: Model, moved: Model, eps: float, rtol: float, slope_tolerance: float
) -> Extreme | None:
    """Return the largest change of ``moved`` in the level set of ``kept``.

    Return None if the gradient of ``kept`` has a part along a flat direction. The level set is then
    no ellipsoid.
    """
    if kept.flat.shape[1] > 0:
        if float((kept.flat.mT @ kept.gradient).norm()) > slope_tolerance:
            return None
        bend = moved.hessian @ kept.flat
        if moved.top > 0 and float(torch.linalg.matrix_norm(bend, 2)) > rtol * moved.top:
            _, _, right = torch.linalg.svd(bend, full_matrices=False)
            return Extreme(math.inf, None, kept.flat @ right[0])
        slope = kept.flat.mT @ moved.gradient
        if float(slope.norm()) > slope_tolerance:
            return Extreme(math.inf, None, kept.flat @ (slope / slope.norm()))
    # With step = centre + whitening x, the level set of kept is a ball in x. It is a shell if the
    # centre is more than eps below the point.
    side = kept.whitening.mT @ kept.gradient
    centre = -kept.whitening @ side
    depth = float(side.square().sum()) / 2
    outer, inner = math.sqrt(2 * (eps + depth)), math.sqrt(2 * max(depth - eps, 0.0))
    curvature, basis = torch.linalg.eigh(kept.whitening.mT @ moved.hessian @ kept.whitening)
    slope = basis.mT @ (kept.whitening.mT @ (moved.gradient + moved.hessian @ centre))
    offset = moved.value - kept.value + moved.change(centre)
    side = basis.mT @ side
    up, high = largest_on_shell(curvature, slope, inner, outer, side)
    down, low = largest_on_shell(-curvature, -slope, inner, outer, side)
    x = high if abs(offset + up) >= abs(offset - down) else low
    step = centre + kept.whitening @ (basis @ x)
    length = step.norm()
    direction = step / length if length > 0 else torch.zeros_like(step)
    return Extreme(max(abs(offset + up), abs(offset - down)), step, direction)


def quadratic(problem: Problem, eps: float, rtol: float) -> Inconsistency:
    """Score the quadratic models of all pairs, and compare models and losses at the extremes."""
    models = [make_model(problem, e, rtol) for e in range(problem.environments)]
    steepest = max(m.top for m in models)
    slope_tolerance = math.sqrt(torch.finfo(problem.point.dtype).eps * 2 * eps * steepest)
    values = torch.full((len(models), len(models)), math.nan, dtype=torch.float64, device="cpu")
    extremes: dict[tuple[int, int], Extreme] = {}
    for kept, moved in problem.pairs():
        largest = extreme(models[kept], models[moved], eps, rtol, slope_tolerance)
        if largest is None:
            slope = float((models[kept].flat.mT @ models[kept].gradient).norm())
            raise not_a_minimum(
                kept, f"the gradient is {slope:.4g} along directions without curvature"
            )
        values[kept, moved] = largest.value
        extremes[kept, moved] = largest
    pair = best_pair(values)
    best = extremes[pair]
    notes = []
    flat = {e: m.flat.shape[1] for e, m in enumerate(models) if m.flat.shape[1] > 0}
    if flat:
        counts = ", ".join(f"{count} for losses[{e}]" for e, count in flat.items())
        notes.append(f"curvature below {rtol:.2g} of the largest taken as none: {counts}")
    error = 0.0
    for kept, model in enumerate(models):
        steps = [random_steps(model, eps)]
        steps += [probe_steps(extremes[p], models[p[1]], eps) for p in extremes if p[0] == kept]
        error = max(error, model_error(problem, models, torch.cat(steps), eps))
    bound = "exact" if error <= agreement(problem) else "estimate"
    if bound != "exact":
        notes.append(f"the losses leave their quadratic models by {error:.2g}")
    return result(
        problem,
        eps,
        values,
        "quadratic",
        bound,
        witness=None if best.step is None else problem.point + best.step.to(problem.point),
        direction=best.direction,
        notes=tuple(notes),
    )


def agreement(problem: Problem) -> float:
    """Return the relative difference below which two values of these losses count as equal."""
    return 10 * math.sqrt(torch.finfo(problem.point.dtype).eps)


def random_steps(kept: Model, eps: float) -> Tensor:
    """Return random steps to the edge of the level set and half-way, far along flat directions."""
    generator = torch.Generator("cpu").manual_seed(0)

    def sphere(size: int) -> Tensor:
        draws = torch.randn(8, size, dtype=torch.float64, device="cpu", generator=generator)
        return torch.nn.functional.normalize(draws)

    curved, flat = kept.whitening.shape[1], kept.flat.shape[1]
    side = kept.whitening.mT @ kept.gradient
    outer = math.sqrt(2 * eps + float(side.square().sum()))
    centre = -kept.whitening @ side
    widest = float(kept.whitening.norm(dim=0).max()) * outer if curved else 1.0
    edge = centre + outer * sphere(curved) @ kept.whitening.mT
    along = widest * sphere(flat) @ kept.flat.mT
    return torch.cat([edge + along, edge / 2 - along])


def probe_steps(best: Extreme, moved: Model, eps: float) -> Tensor:
    """Return steps at which to compare model and losses: near the witness, or far out."""
    if best.step is not None:
        return torch.stack([best.step, best.step / 2, -best.step])
    bend = float(best.direction @ moved.hessian @ best.direction)
    slope = abs(float(best.direction @ moved.gradient))
    unit = math.sqrt(2 * eps / bend) if bend > 0 else eps / slope if slope > 0 else 1.0
    return best.direction * unit * FAR_OUT


def model_error(problem: Problem, models: Sequence[Model], steps: Tensor, eps: float) -> float:
    """Return the difference of losses and models after ``steps``, relative to the change."""
    points = problem.point + steps.to(problem.point)
    worst = 0.0
    for environment, model in enumerate(models):
        losses = problem.values(environment, points).to("cpu", torch.float64).tolist()
        for loss, step in zip(losses, steps, strict=True):
            expected = model.change(step)
            difference = abs(loss - problem.start[environment] - expected)
            if not math.isfinite(difference):
                return math.inf
            worst = max(worst, difference / max(eps, abs(expected)))
    return worst


# ---- extremes of a quadratic function, sum_i (curvature_i x_i^2 / 2 + slope_i x_i), on a shell
#
# On a sphere this is the trust-region problem: More and Sorensen, *Computing a trust region step*,
# 1983.


def evaluate(curvature: Tensor, slope: Tensor, x: Tensor) -> float:
    """Return the function's value at ``x``."""
    return float((curvature * x.square() / 2 + slope * x).sum())


def largest_on_sphere(curvature: Tensor, slope: Tensor, radius: float) -> Tensor:
    """Return the point of the sphere where the function is largest.

    There x_i = slope_i / (mu + top - curvature_i), with mu >= 0 such that x has the right length.
    If the slope has no part along the top curvature, mu may be 0. That part of x then makes up for
    the length.
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
    # x shrinks as mu grows. So bisect log(mu) between values where x is too long and too short.
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
    """Return the largest value of the function for inner <= ``|x|`` <= outer, and its point.

    In one dimension, a shell with a hole consists of two intervals. Only the interval on the side
    of the point ``side`` counts.
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
