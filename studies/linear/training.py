"""Training on the unit tests: a linear model by full-batch Adam, many settings at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import andmask_ext as am

from ..search import draw
from ..study import Outcome, Report, Settings
from .unit_tests import Problem, Split, draw_problem

METHODS = ("mean", "and-mask", "fdr", "significance", "geometric", "irm", "oracle")

Trial = dict[str, Any]
_COMMON: dict[str, Sequence[Any]] = {
    "lr": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "weight_decay": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
}
MOST_TRIALS = math.prod(map(len, _COMMON.values()))
_OWN: dict[str, dict[str, Sequence[Any]]] = {
    "and-mask": {"tau": (0.8, 0.9, 1.0)},
    "fdr": {"fdr": (0.005, 0.05, 0.5)},
    "significance": {"significance": (0.005, 0.05, 0.5)},
    "geometric": {"tau": (0.8, 0.9, 1.0)},
    "irm": {"penalty": (0.5, 0.9, 0.99, 0.999)},
}


@dataclass(frozen=True)
class UnitTestSettings(Settings):
    """What decides a run on a unit test but its seed.

    Args:
        example: 1, 2 or 3.
        scrambled: whether its inputs are rotated.
        environments: training environments.
        method: one of ``METHODS``.
        samples: examples in each environment.
        iterations: steps of full-batch Adam.
        trials: settings that are tried.
    """

    example: int
    scrambled: bool
    environments: int
    method: str
    samples: int = 1000
    iterations: int = 1000
    trials: int = 12

    def identity(self) -> dict[str, Any]:
        """Return what decides the outcome: the settings that are tried, and not just how many."""
        return {**super().identity(), "trials": make_trials(self.method, self.trials)}


def make_trials(method: str, count: int) -> list[Trial]:
    """Return the settings to try, the same ones for every seed.

    Learning rates and weight decays are drawn at random, the same ones for all methods. With them
    go the values of the method's own option, one after the other.
    """
    own = _OWN.get(method, {})
    return [
        {**trial, **{name: values[number % len(values)] for name, values in own.items()}}
        for number, trial in enumerate(draw(_COMMON, count, seed=0))
    ]


def least(errors: Sequence[float | None]) -> int:
    """Return the place of the least error, the first of several; None and NaN are the largest."""

    def size(place: int) -> float:
        error = errors[place]
        return math.inf if error is None or math.isnan(error) else error

    return min(range(len(errors)), key=size)


def run_unit_test(settings: UnitTestSettings, seed: int, report: Report) -> Outcome:
    """Train with each setting of a random search, and measure all of them.

    Which setting is best is for the mean over seeds to say.
    """
    problem = draw_problem(
        settings.example, settings.environments, settings.samples, settings.scrambled, seed
    )
    oracle = settings.method == "oracle"
    trials = make_trials(settings.method, settings.trials)
    weights = train(problem, settings.method, trials, settings.iterations, seed, report)
    validation = problem.oracle_validation if oracle else problem.validation
    errors = {
        name: measure(weights, split, problem.classification)
        for name, split in (("validation", validation), ("test", problem.test))
    }
    best = least(errors["validation"])
    final = {name: values[best] for name, values in errors.items()}
    return Outcome({"final": final, "trials": trials, **errors})


def train(
    problem: Problem,
    method: str,
    trials: Sequence[Trial],
    iterations: int,
    seed: int,
    report: Report = lambda done, total, text: None,
) -> Tensor:
    """Train a linear model for each setting from the same start; weights ``[trials, 11]``."""
    split = problem.oracle_train if method == "oracle" else problem.train
    inputs = _with_ones(split.inputs)
    generator = torch.Generator().manual_seed(seed)
    bound = (inputs.shape[2] - 1) ** -0.5
    start = bound * (2 * torch.rand(inputs.shape[2], generator=generator) - 1)
    params = [start.clone() for _ in trials]
    optimizer = torch.optim.Adam(
        [
            {"params": [param], "lr": trial["lr"], "weight_decay": trial["weight_decay"]}
            for param, trial in zip(params, trials, strict=True)
        ],
        fused=True,
    )
    penalties = torch.tensor([trial.get("penalty", 0.0) for trial in trials])
    rules = [_rule(method, trial) for trial in trials]
    for iteration in range(iterations):
        grads = environment_gradients(
            torch.stack(params), inputs, split.answers, problem.classification, penalties
        )
        for param, rule, grad in zip(params, rules, grads.unbind(1), strict=True):
            param.grad = rule(grad)
        optimizer.step()
        if iteration % 100 == 0:
            report(iteration + 1, iterations, "")
    return torch.stack(params)


def _rule(method: str, trial: Trial) -> Callable[[Tensor], Tensor]:
    if method in ("and-mask", "fdr", "significance"):
        name = "tau" if method == "and-mask" else method
        return am.AndMask(**{name: trial[name]})
    return am.rules.GeometricMean(trial["tau"]) if method == "geometric" else am.rules.Mean()


def environment_gradients(
    weights: Tensor, inputs: Tensor, answers: Tensor, classification: bool, penalties: Tensor
) -> Tensor:
    r"""Return the gradient of each environment's objective, for several linear models at once.

    The objective is :math:`(1 - \lambda) L_e + \lambda (\partial_w L_e(w f))^2` at w = 1: the loss,
    a mean over examples, with the penalty of IRMv1. Loss is the squared error or cross entropy.

    Reference:
        Arjovsky et al., *Invariant risk minimization*, 2019, arXiv 1907.02893, section 3.
    """
    outputs = inputs @ weights.T  # [d, n, t]
    if classification:
        chance = outputs.sigmoid()
        slope = chance - answers[:, :, None]
    else:
        slope = 2 * (outputs - answers[:, :, None])
    count = inputs.shape[1]
    grads = slope.mT @ inputs / count
    if not penalties.any():
        return grads
    curvature = chance * (1 - chance) if classification else torch.full_like(outputs, 2.0)
    tilt = (slope * outputs).mean(1)  # derivative by a factor w of the outputs, [d, t]
    bend = (slope + outputs * curvature).mT @ inputs / count
    weight = penalties[:, None]
    return (1 - weight) * grads + weight * 2 * tilt[:, :, None] * bend


@torch.no_grad()
def measure(weights: Tensor, split: Split, classification: bool) -> list[float]:
    """Return the share of wrong answers, or the squared error, of each model."""
    outputs = _with_ones(split.inputs) @ weights.T
    answers = split.answers[:, :, None]
    errors = (outputs > 0) != (answers > 0.5) if classification else (outputs - answers).square()
    found: list[float] = errors.double().mean((0, 1)).tolist()
    return found


def _with_ones(inputs: Tensor) -> Tensor:
    return torch.cat((inputs, inputs.new_ones(*inputs.shape[:-1], 1)), dim=-1)
