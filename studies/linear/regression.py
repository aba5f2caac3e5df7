"""The authors' linear regression: four points, each an environment, two ways to fit them.

Point e has a strong input of its own, ``3`` in dimension e, and a weak one that all share, ``.3``
in the last. All answers are 1. The *patchwork* solution gives each point its own weight, the
*shared* one uses the last input alone, and costs more where weights decay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import andmask_ext as am

from ..study import Outcome, Settings

POINTS = 4
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": am.rules.Mean(),
    "and-mask": am.AndMask(tau=1.0),
    "geometric": am.rules.GeometricMean(tau=1.0),
}
ENVIRONMENTS = {"all four": (0, 1, 2, 3), "first two": (0, 1), "last two": (2, 3)}

LR, LR_FACTOR, DECAY, STEPS, START = 0.3, 0.9995, 0.01, 1001, 0.1


@dataclass(frozen=True)
class Stored:
    """What the authors' notebook has kept of a run."""

    rule: str  # one of RULES
    environments: str  # a key of ENVIRONMENTS
    theta: tuple[float, float, float, float, float]
    loss: float


# Source: notebooks/linear_regression_ilc.ipynb of the code released with the paper.
STORED = (
    Stored("mean", "all four", (0.31931, 0.31931, 0.31931, 0.31931, 0.12607), 0.000009),
    Stored("mean", "first two", (0.32612, 0.32612, -0.0083, -0.01935, 0.06488), 0.000002),
    Stored("and-mask", "all four", (-0.01037, -0.00366, 0.00346, -0.00259, 3.03233), 0.005125),
    Stored("and-mask", "first two", (0.00093, 0.00121, 0.00498, 0.00368, 2.98875), 0.005017),
    Stored("and-mask", "last two", (0.01625, -0.00105, 0.00531, 0.0009, 2.96843), 0.005039),
    Stored("geometric", "all four", (0.02175, 0.00457, 0.01312, 0.01974, 2.84444), 0.005433),
)


@dataclass(frozen=True)
class RegressionSettings(Settings):
    """What decides a run of the regression but its seed.

    Args:
        rule: one of ``RULES``.
        environments: a key of ``ENVIRONMENTS``.
        stored: start where the stored run must have started, rather than at random.
    """

    rule: str
    environments: str
    stored: bool = False


def points() -> Tensor:
    """Return the inputs of the four points."""
    eye = torch.eye(POINTS, dtype=torch.float64)
    return 3 * torch.cat((eye, torch.full((POINTS, 1), 0.1, dtype=torch.float64)), dim=1)


def losses(theta: Tensor) -> Tensor:
    """Return the loss of each point, half the squared error."""
    return (points() @ theta - 1).square() / 2


def descend(rule: str, environments: str, start: Tensor) -> Tensor:
    r"""Do the notebook's descent.

    A step multiplies the learning rate by .9995, moves :math:`\theta` against what the rule makes
    of the points' gradients, and then shrinks *the result* by the factor ``1 - lr * .01``. There
    are 1001 steps.
    """
    chosen = list(ENVIRONMENTS[environments])
    inputs, theta, lr = points()[chosen], start.double(), LR
    for _ in range(STEPS):
        lr *= LR_FACTOR
        grads = (inputs @ theta - 1)[:, None] * inputs
        theta = (theta - lr * RULES[rule](grads)) * (1 - lr * DECAY)
    return theta


def left_of_start() -> float:
    """Return the factor by which decay alone shrinks a weight in the whole descent."""
    left, lr = 1.0, LR
    for _ in range(STEPS):
        lr *= LR_FACTOR
        left *= 1 - lr * DECAY
    return left


def recovered_start(stored: Stored) -> Tensor:
    """Return where a stored run must have started.

    The notebook starts at random, without a seed. What no gradient ever moves is still there at the
    end, shrunk by decay: with a mask the four weights that only one point has a gradient for,
    without one all that is orthogonal to the points. The rest of the start is forgotten, and is
    taken to be zero.
    """
    moved = points()[list(ENVIRONMENTS[stored.environments])]
    if stored.rule != "mean":
        moved = torch.eye(POINTS + 1, dtype=torch.float64)[-1:]
    theta = torch.tensor(stored.theta, dtype=torch.float64)
    part: Tensor = torch.linalg.pinv(moved) @ (moved @ theta)
    return (theta - part) / left_of_start()


def stored_outcome(rule: str, environments: str) -> Stored:
    """Return what the notebook has kept of a run."""
    return next(s for s in STORED if (s.rule, s.environments) == (rule, environments))


def run_regression(settings: RegressionSettings, seed: int) -> Outcome:
    """Descend, and measure the loss on the points that were seen and on the others."""
    if settings.stored:
        start = recovered_start(stored_outcome(settings.rule, settings.environments))
    else:
        start = START * torch.randn(POINTS + 1, generator=torch.Generator().manual_seed(seed))
    theta = descend(settings.rule, settings.environments, start)
    each, seen = losses(theta), list(ENVIRONMENTS[settings.environments])
    others = [number for number in range(POINTS) if number not in seen]
    final = {
        "seen_loss": each[seen].mean().item(),
        "unseen_loss": each[others].mean().item() if others else None,
    }
    return Outcome({"final": final, "start": start.tolist(), "theta": theta.tolist()})
