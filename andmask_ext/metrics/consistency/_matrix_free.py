"""The score of the quadratic model from Hessian-vector products, for many parameters.

Imported where it is needed: it needs scipy, which the rest does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse.linalg as sparse
import torch
from torch import Tensor

from ._problem import Problem
from ._quadratic import FAR_OUT, agreement, model_error, not_a_minimum
from ._result import Inconsistency, best_pair, result


def _condition(digits: float) -> float:
    """Return the condition beyond which conjugate gradients lose the digits they need."""
    return min(1e8, 0.01 / digits)


class _Hessian:
    """One environment's Hessian as a linear map on numpy vectors."""

    def __init__(self, problem: Problem, environment: int) -> None:
        self.problem, self.environment = problem, environment
        self.digits = float(torch.finfo(problem.point.dtype).eps)
        self.product = problem.product(environment)

    def __call__(self, vector: Any) -> Any:
        flat = torch.from_numpy(np.array(vector, dtype=np.float64).ravel())
        return self.product(flat.to(self.problem.point)).to("cpu", torch.float64).numpy()

    def largest(self, shift: float | None = None) -> tuple[float, Any]:
        """Return the largest eigenpair; with a shift, that of shift - Hessian."""
        size = self.problem.size

        def apply(vector: Any) -> Any:
            product = self(vector)
            return product if shift is None else shift * np.asarray(vector).ravel() - product

        start = _start(size)
        if not apply(start).any():
            return 0.0, start / np.linalg.norm(start)
        operator = sparse.LinearOperator((size, size), matvec=apply, dtype=np.float64)
        tolerance = max(1e-7, 10 * self.digits)
        where = f"losses[{self.environment}]"
        return _eigenpair(where, operator, tol=tolerance, v0=start)

    def solve(self, right: Any) -> Any:
        """Return the solution of Hessian x = right by conjugate gradients."""
        x, residual = np.zeros_like(right), np.array(right)
        direction, size = residual.copy(), residual @ residual
        target = max(1e-11, 10 * self.digits) ** 2 * size
        for _ in range(20 * len(right)):
            if size <= target:
                return x
            product = self(direction)
            curvature = direction @ product
            if not curvature > 0:
                raise not_a_minimum(self.environment, f"a direction has curvature {curvature:.4g}")
            step = size / curvature
            x += step * direction
            residual -= step * product
            size, before = residual @ residual, size
            direction = residual + (size / before) * direction
        raise RuntimeError(
            f"losses[{self.environment}]: conjugate gradients did not converge on the Hessian at "
            "params; take method='diagonal' or 'search'"
        )


def _start(size: int) -> Any:
    """Return a start for Lanczos iteration: the same each time, and random to any Hessian."""
    return np.random.default_rng(0).standard_normal(size)


def _eigenpair(where: str, operator: Any, **options: Any) -> tuple[float, Any]:
    """Return the largest eigenpair by Lanczos iteration."""
    try:
        values, vectors = sparse.eigsh(operator, k=1, which="LA", **options)
    except sparse.ArpackError as error:
        raise RuntimeError(
            f"{where}: Lanczos iteration on the Hessians at params failed ({error}); "
            "take method='diagonal' or 'search'"
        ) from error
    return float(values[0]), vectors[:, 0]


def matrix_free(problem: Problem, eps: float) -> Inconsistency:
    """Score the quadratic models by Lanczos iteration; raise where they are no minima."""
    count = problem.environments
    hessians = [_Hessian(problem, e) for e in range(count)]
    gradients = [problem.gradient(e).numpy() for e in range(count)]
    tops = [hessian.largest()[0] for hessian in hessians]
    values = torch.full((count, count), math.nan, dtype=torch.float64, device="cpu")
    for e, hessian in enumerate(hessians):
        gap, flattest = hessian.largest(shift=2 * tops[e])
        bottom = 2 * tops[e] - gap
        if bottom > max(tops[e], 0.0) / _condition(hessian.digits):
            continue
        if bottom < -abs(tops[e]) * max(1e-6, 100 * hessian.digits):
            raise not_a_minimum(
                e, f"the Hessian's smallest eigenvalue is {bottom:.4g} (largest {tops[e]:.4g})"
            )
        return _flat(problem, eps, values, e, flattest, hessians, tops)
    witnesses: dict[tuple[int, int], Any] = {}
    influence = 0.0
    for kept, moved in problem.pairs():
        ratio, vector = _largest_ratio(hessians[kept], hessians[moved])
        gap = problem.start[moved] - problem.start[kept]
        values[kept, moved] = max(abs(gap), abs(gap + eps * ratio))
        length = math.sqrt(2 * eps / (vector @ hessians[kept](vector)))
        witnesses[kept, moved] = vector * (length if abs(gap + eps * ratio) >= abs(gap) else 0.0)
        share = _influence(hessians[kept], gradients[kept], gradients[moved], eps, ratio)
        if share > 0.1:
            raise not_a_minimum(
                kept, f"the gradients there and for losses[{moved}] move the score by {share:.2g}"
            )
        influence = max(influence, share)
    pair = best_pair(values)
    error = influence
    changes = [_change(hessian) for hessian in hessians]
    for kept, hessian in enumerate(hessians):
        found = [torch.from_numpy(witnesses[p]) for p in witnesses if p[0] == kept]
        steps = [step * share for step in found for share in (1.0, 0.5, -1.0)]
        error = max(error, model_error(problem, changes, _random_steps(hessian, eps, steps), eps))
    step = torch.from_numpy(witnesses[pair])
    exact = error <= agreement(problem)
    note = f"the losses leave quadratic models without gradient by {error:.2g}"
    length = float(step.norm())
    return result(
        problem,
        eps,
        values,
        "quadratic",
        "exact" if exact else "estimate",
        witness=problem.point + step.to(problem.point),
        direction=step / length if length > 0 else step,
        notes=("by Hessian-vector products",) + (() if exact else (note,)),
    )


def _largest_ratio(kept: _Hessian, moved: _Hessian) -> tuple[float, Any]:
    """Return the largest eigenvalue of kept^-1 moved and its vector, residual checked."""
    size = kept.problem.size
    maps = [
        sparse.LinearOperator((size, size), matvec=matvec, dtype=np.float64)
        for matvec in (moved, kept, kept.solve)
    ]
    tolerance = max(1e-7, 10 * kept.digits)
    start = _start(size)
    if not moved(start).any():
        return 0.0, start
    where = f"losses[{kept.environment}], losses[{moved.environment}]"
    ratio, vector = _eigenpair(where, maps[0], M=maps[1], Minv=maps[2], tol=tolerance, v0=start)
    one, other = moved(vector), ratio * kept(vector)
    residual = float(np.linalg.norm(one - other)) / max(float(np.linalg.norm(one)), 1e-300)
    if residual > max(1e-3, 1e3 * kept.digits):
        raise RuntimeError(
            f"{where}: the eigenpair of the Hessians has the residual {residual:.2g}; "
            "take method='diagonal' or 'search'"
        )
    return ratio, vector


def _influence(hessian: _Hessian, kept: Any, moved: Any, eps: float, ratio: float) -> float:
    """Bound how much the gradients, which are left out, change a score of eps * ratio."""
    own = math.sqrt(max(kept @ hessian.solve(kept), 0.0) / 2 / eps) if kept.any() else 0.0
    other = math.sqrt(max(moved @ hessian.solve(moved), 0.0) / 2 / eps) if moved.any() else 0.0
    return 2 * own + own**2 + 2 * other * (1 + own) / max(ratio, 1e-300)


def _change(hessian: _Hessian) -> Callable[[Tensor], float]:
    return lambda step: float(step.numpy() @ hessian(step.numpy())) / 2


def _random_steps(hessian: _Hessian, eps: float, steps: list[Tensor]) -> Tensor:
    """Return the steps and, besides, some in random directions to the edge of the level set."""
    generator = np.random.default_rng(1)
    for _ in range(8):
        vector = generator.standard_normal(hessian.problem.size)
        length = math.sqrt(2 * eps / (vector @ hessian(vector)))
        steps = [*steps, torch.from_numpy(vector * length)]
    return torch.stack(steps)


def _flat(
    problem: Problem,
    eps: float,
    values: Tensor,
    kept: int,
    vector: Any,
    hessians: list[_Hessian],
    tops: list[float],
) -> Inconsistency:
    """Return the infinite score of a flat direction that bends another environment's loss."""
    bends = [float(vector @ hessian(vector)) for hessian in hessians]
    moved = max((e for e in range(len(bends)) if e != kept), key=lambda e: bends[e])
    if bends[moved] <= tops[moved] * max(1e-6, 100 * hessians[kept].digits):
        raise not_a_minimum(
            kept,
            f"the Hessian's condition exceeds {_condition(hessians[kept].digits):.0e}, too much "
            "for this many parameters,",
        )
    values[kept, moved] = math.inf
    direction = torch.from_numpy(np.array(vector))
    unit = math.sqrt(2 * eps / bends[moved])
    steps = direction * unit * FAR_OUT
    changes = [_change(hessian) for hessian in hessians]
    error = model_error(problem, changes, steps, eps)
    least = 1 / _condition(hessians[kept].digits)
    note = f"curvature below {least:.0e} of the largest taken as none; other pairs not done"
    return result(
        problem,
        eps,
        values,
        "quadratic",
        "exact" if error <= agreement(problem) else "estimate",
        direction=direction,
        notes=("by Hessian-vector products", note),
    )
