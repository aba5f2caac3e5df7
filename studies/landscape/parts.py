"""The parts of the study: descents, scores of two minima, quadratics, the patchwork example."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import andmask_ext as am

from ..study import Report
from . import patchwork
from .surfaces import BOUNDS, LOSSES, POINTS, Loss, descend, quadratic

RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": am.rules.Mean(),
    "and-mask": am.AndMask(tau=1.0),
    "geometric mean": am.rules.GeometricMean(tau=1.0),
    "geometric mean, no vote": am.rules.GeometricMean(tau=0.0),
}
LR = 0.05
NEAR = 0.1  # distance at which a descent has ended at a minimum
ILC_EPSILON = 0.01
SEARCH_STARTS, ILC_STEPS, MINIMA_STEPS = 4, 60, 100
SEEDS_APART = 100_000  # between the starts of two seeds
PAIRS: dict[str, tuple[tuple[tuple[float, float], ...], ...]] = {
    "similar": (((2.0, 0.0), (0.0, 1.0)), ((1.0, 0.0), (0.0, 2.0))),
    "across each other": (((10.0, 0.0), (0.0, 0.5)), ((0.5, 0.0), (0.0, 10.0))),
    "turned": (((10.0, 0.0), (0.0, 0.5)), ((3.92, 4.56), (4.56, 6.58))),
    "one steep": (((1.0, 0.0), (0.0, 1.0)), ((9.0, 0.0), (0.0, 2.0))),
}


def search(
    losses: Sequence[Loss], theta: Sequence[float], epsilon: float, steps: int, seed: int
) -> am.metrics.Inconsistency:
    """Search for the inconsistency score of a point."""
    return am.metrics.inconsistency_score(
        losses,
        torch.tensor(theta, dtype=torch.float64),
        epsilon,
        "search",
        starts=SEARCH_STARTS,
        steps=steps,
        generator=torch.Generator().manual_seed(seed),
    )


def draw_start(generator: torch.Generator) -> Tensor:
    """Draw a start on the surfaces."""
    left, right, low, high = BOUNDS
    share = torch.rand(2, generator=generator, dtype=torch.float64)
    return torch.tensor([left, low]) + share * torch.tensor([right - left, high - low])


def descents(
    rule: str, starts: int, steps: int, samples: int, seed: int, report: Report
) -> dict[str, Any]:
    """Descend from random starts, and measure the invariant learning consistency of the rule."""
    first = seed * SEEDS_APART
    generators = [torch.Generator().manual_seed(first + k) for k in range(max(starts, samples))]
    begins = torch.stack([draw_start(generator) for generator in generators])
    ends = descend(LOSSES, begins, RULES[rule], LR, steps)[-1]
    after = descend(LOSSES, ends, RULES[rule], LR, 1)[-1]
    moves = (after - ends).norm(dim=1) / LR
    names = list(POINTS)
    places = torch.tensor(list(POINTS.values()), dtype=torch.float64)
    distances = torch.cdist(ends, places)
    reached = torch.where(distances.amin(1) < NEAR, distances.argmin(1), len(names))
    found = [[*names, "elsewhere"][index] for index in reached[:starts].tolist()]

    def train(start: Any) -> Tensor:  # done already, all together
        return ends[int((begins == start).all(1).nonzero()[0])]

    ilc = am.metrics.invariant_learning_consistency(
        train,
        draw_start,
        LOSSES,
        ILC_EPSILON,
        samples,
        seed=first,
        progress=lambda done, total: report(done + 1, total, "scores"),
        method="search",
        starts=SEARCH_STARTS,
        steps=ILC_STEPS,
    )
    lost = reached[:starts] == len(names)
    return {
        "final": {f"{name} %": 100 * found.count(name) / starts for name in [*names, "elsewhere"]},
        "starts": [[round(value, 4) for value in start] for start in begins[:starts].tolist()],
        "ends": found,
        "largest_gradient_elsewhere": float(moves[:starts][lost].max()) if lost.any() else None,
        "ilc": {
            "mean": ilc.mean,
            "bound": ilc.bound,
            "scores": [float(one.score) for one in ilc.results],
        },
    }


def minima(epsilons: tuple[float, ...], seed: int, report: Report) -> dict[str, Any]:
    """Score both minima of the surfaces."""

    def pooled(theta: Tensor) -> Tensor:
        return torch.stack([loss(theta) for loss in LOSSES]).mean()

    results: dict[str, Any] = {}
    for number, (name, place) in enumerate(POINTS.items()):
        point = torch.tensor(place, dtype=torch.float64)
        scores = []
        for step, epsilon in enumerate(epsilons):
            found = search(LOSSES, place, epsilon, MINIMA_STEPS, seed)
            scores.append(float(found.score))
            report(number * len(epsilons) + step + 1, 2 * len(epsilons), f"{name} {epsilon:g}")
        results[name] = {
            "losses": [float(loss(point)) for loss in LOSSES],
            "pooled_gradient": float(torch.func.grad(pooled)(point).norm()),
            "pooled_curvatures": torch.linalg.eigvalsh(torch.func.hessian(pooled)(point)).tolist(),
            "scores": scores,
        }
    final = {f"score of {name}": one["scores"][-1] for name, one in results.items()}
    return {"final": final, "minima": results}


def quadratics() -> dict[str, Any]:
    """Compare exact scores of pairs of quadratics, at epsilon 1, with bounds said to hold."""
    results = {}
    for name, hessians in PAIRS.items():
        matrices = torch.tensor(hessians, dtype=torch.float64)
        losses = [quadratic(hessian) for hessian in hessians]
        center = torch.zeros(2, dtype=torch.float64)
        found = am.metrics.inconsistency_score(losses, center, 1.0, "quadratic")
        ratio = float(am.metrics.hessian_means(matrices).log_det_ratio.exp())
        results[name] = {
            "determinants": ratio,
            "score": float(found.score),
            "exact": found.bound == "exact",
            "printed_bound": 2 * ratio**2,
            "sharp_bound": (ratio + math.sqrt(max(ratio**2 - 1, 0.0))) ** 2,
        }
    return {"final": {"pairs": len(results)}, "pairs": results}


def patches(
    epsilons: tuple[float, ...], steps: tuple[int, ...], seed: int, report: Report
) -> dict[str, Any]:
    """Score the patchwork solution by search."""
    functions = patchwork.losses()
    searches: list[dict[str, Any]] = []
    for number, epsilon in enumerate(epsilons):
        for place, most in enumerate(steps):
            found = search(functions, patchwork.SOLUTION, epsilon, most, seed)
            assert isinstance(found.witness, Tensor)
            searches.append(
                {
                    "epsilon": epsilon,
                    "steps": most,
                    "score": float(found.score),
                    "kept": found.environments[0],
                    "losses": [float(loss(found.witness)) for loss in functions],
                    "witness": found.witness.tolist(),
                }
            )
            done = number * len(steps) + place + 1
            report(done, len(epsilons) * len(steps), f"epsilon {epsilon:g}")

    def at(theta: tuple[float, ...]) -> list[float]:
        return [float(loss(torch.tensor(theta, dtype=torch.float64))) for loss in functions]

    return {
        "final": {"largest score": max(one["score"] for one in searches)},
        "solution": at(patchwork.SOLUTION),
        "turned": at(patchwork.TURNED),
        "searches": searches,
    }
