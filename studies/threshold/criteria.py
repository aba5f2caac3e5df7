"""Criteria that the library does not have, to see whether one of them is right for both tasks.

Each sets thresholds on votes afresh at every step, from the same null as the library's ``fdr``:
signs of noise are fair coins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

import andmask_ext as am

from ..figures import Array
from ..label_noise.training import NoiseSettings
from ..masks import Mask
from ..spirals import Settings as SpiralsSettings
from ..study import Settings

EXACT = 1 + 1e-9  # levels are reached up to rounding
MEMORY = 0.9  # share of the former average in the accumulated votes


@dataclass(frozen=True)
class CriterionSettings(Settings):
    """What decides a run but its seed.

    Args:
        criterion: one of ``CRITERIA``.
        level: its level.
        task: data, network and optimizer; its own threshold is not used.
    """

    criterion: str
    level: float
    task: SpiralsSettings | NoiseSettings

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise ValueError(
                f"criterion: expected one of {', '.join(CRITERIA)}, got {self.criterion!r}"
            )

    def identity(self) -> dict[str, Any]:
        """Return what decides the outcome, as JSON can hold it."""
        return {
            "criterion": self.criterion,
            "level": self.level,
            "task": self.task.identity(),
        }

    def mask(self) -> Mask:
        """Return a new mask of this criterion."""
        return CRITERIA[self.criterion](self.level)


@lru_cache
def null(environments: int) -> Array:
    """Return the probability that noise has k net votes or more, for k = 0 to d: ``[d + 1]``."""
    total = 2**environments  # integers: exact, and no underflow on the way
    exactly = [0] * (environments + 1)
    for heads in range(environments + 1):
        exactly[abs(2 * heads - environments)] += math.comb(environments, heads)
    beyond = np.cumsum(np.array(exactly[::-1], dtype=object))[::-1]
    return np.array([int(count) / total for count in beyond])


def tail(votes: Tensor, environments: int, weights: Tensor | None = None) -> Array:
    """Return how many coordinates have k net votes or more, or their weight: ``[d + 1]``."""
    size = votes.abs().flatten().long()
    counts = torch.bincount(
        size, None if weights is None else weights.flatten().double(), environments + 1
    )
    return np.asarray(counts.flip(0).cumsum(0).flip(0).numpy())


def least(passes: Array) -> int:
    """Return the least k that passes; one more than all if there is none."""
    return int(passes.argmax()) if passes.any() else len(passes)


def discoveries(beyond: Array, count: int, level: float) -> int:
    """Return the least k beyond which at most ``level`` of the ``count`` coordinates are noise."""
    expected = count * null(len(beyond) - 1)
    return least((beyond > 0) & (expected <= level * beyond * EXACT))


class ForModel(Mask):
    """The false discovery rate of all tensors together: one threshold for the model."""

    def __init__(self, level: float) -> None:
        self.level = level

    def masks(self, moments: am.Moments) -> list[Tensor]:
        """Return which coordinates pass."""
        votes = _votes(moments)
        beyond = np.sum([tail(one, moments.count) for one in votes], axis=0)
        threshold = discoveries(beyond, sum(one.numel() for one in votes), self.level)
        return [one.abs() >= threshold for one in votes]


class ForRow(Mask):
    """The false discovery rate of each output row: the weights of a unit, or of a channel."""

    def __init__(self, level: float) -> None:
        self.level = level

    def masks(self, moments: am.Moments) -> list[Tensor]:
        """Return which coordinates pass."""
        found = []
        for votes in _votes(moments):
            rows = votes.flatten(1) if votes.dim() > 1 else votes[None]
            thresholds = [
                discoveries(tail(row, moments.count), row.numel(), self.level) for row in rows
            ]
            passes = rows.abs() >= torch.tensor(thresholds)[:, None]
            found.append(passes.view_as(votes))
        return found


class FalseCount(Mask):
    """A bound on the expected number of coordinates of noise in a tensor, not on their share."""

    def __init__(self, level: float) -> None:
        self.level = level

    def masks(self, moments: am.Moments) -> list[Tensor]:
        """Return which coordinates pass."""
        chance = null(moments.count)
        return [
            votes.abs() >= least(votes.numel() * chance <= self.level * EXACT)
            for votes in _votes(moments)
        ]


class Energy(Mask):
    """The false discovery rate of squared means: noise has the mean energy of its tensor."""

    def __init__(self, level: float) -> None:
        self.level = level

    def masks(self, moments: am.Moments) -> list[Tensor]:
        """Return which coordinates pass."""
        found = []
        for votes, sums in zip(_votes(moments), moments.sum, strict=True):
            assert sums is not None
            energy = tail(votes, moments.count, sums.double().square())
            noise = null(moments.count) * energy[0]
            passes = (tail(votes, moments.count) > 0) & (noise <= self.level * energy * EXACT)
            found.append(votes.abs() >= least(passes))
        return found


class Accumulated(Mask):
    """The false discovery rate of votes that are averaged over steps, with decaying weights.

    The null takes votes of noise at different steps for independent, as those of examples that are
    drawn afresh. Where environments come again, so do their votes, and it is wrong.
    """

    BINS = 1200
    WIDTH = 0.01  # of a bin, in standard deviations

    def __init__(self, level: float) -> None:
        self.level = level
        self.steps = 0
        self.average: list[Tensor] = []

    def masks(self, moments: am.Moments) -> list[Tensor]:
        """Return which coordinates pass."""
        votes = _votes(moments)
        if not self.average:
            self.average = [torch.zeros(one.shape) for one in votes]
        self.steps += 1
        left = MEMORY**self.steps
        variance = moments.count * (1 - MEMORY) * (1 + left) / ((1 + MEMORY) * (1 - left))
        edges = np.arange(self.BINS) * self.WIDTH
        chance = np.array([math.erfc(edge / 2**0.5) for edge in edges])
        found = []
        for one, average in zip(votes, self.average, strict=True):
            average.mul_(MEMORY).add_(one, alpha=1 - MEMORY)
            size = average.abs() / (1 - left) / variance**0.5
            bins = (size / self.WIDTH).long().clamp(max=self.BINS - 1)
            beyond = tail(bins, self.BINS - 1)
            found.append(
                bins >= least((beyond > 0) & (one.numel() * chance <= self.level * beyond))
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the averages."""
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.steps, self.average = state["steps"], state["average"]


def _votes(moments: am.Moments) -> list[Tensor]:
    votes = []
    for one in moments.votes:
        assert one is not None, "every parameter has a gradient"
        votes.append(one)
    return votes


CRITERIA: dict[str, Callable[[float], Mask]] = {
    "fdr of the model": ForModel,
    "fdr of a row": ForRow,
    "false count": FalseCount,
    "fdr of energy": Energy,
    "accumulated votes": Accumulated,
}
