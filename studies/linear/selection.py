"""What the runs on unit tests come to: one setting for each method, chosen over all seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..study import Finished, Settings
from .training import Trial, UnitTestSettings, least


@dataclass(frozen=True)
class Cell:
    """A method on a unit test."""

    example: int
    scrambled: bool
    environments: int
    method: str
    trial: Trial  # the chosen setting
    validation: float  # error that it was chosen by, the mean over seeds
    test: dict[int, float]  # error for each seed

    @property
    def error(self) -> float:
        """The mean test error."""
        return statistics.mean(self.test.values())


class Cells:
    """All methods on all unit tests.

    Of the settings tried, that with the least mean validation error over the seeds is taken, the
    first of several; test errors take no part in the choice.
    """

    def __init__(self, finished: Sequence[Finished[Settings]]) -> None:
        groups: dict[Any, list[tuple[UnitTestSettings, int, Any]]] = {}
        for one in finished:
            settings = one.run.settings
            if isinstance(settings, UnitTestSettings):
                groups.setdefault(settings, []).append((settings, one.run.seed, one.record))
        self.cells = [_choose(group) for group in groups.values()]
        self.environments = sorted({cell.environments for cell in self.cells})

    def get(self, example: int, scrambled: bool, environments: int, method: str) -> Cell:
        """Return one of them; raises StopIteration where there is none."""
        wanted = (example, scrambled, environments, method)
        return next(
            cell
            for cell in self.cells
            if (cell.example, cell.scrambled, cell.environments, cell.method) == wanted
        )


def _choose(group: list[tuple[UnitTestSettings, int, Any]]) -> Cell:
    settings, _, first = group[0]
    for _, seed, record in group:
        if record["trials"] != first["trials"]:
            raise ValueError(
                f"trials: expected the same settings for all seeds, got others for seed {seed}"
            )
    means = [
        statistics.mean(_number(record["validation"][trial]) for _, _, record in group)
        for trial in range(len(first["trials"]))
    ]
    best = least(means)
    return Cell(
        settings.example,
        settings.scrambled,
        settings.environments,
        settings.method,
        first["trials"][best],
        means[best],
        {seed: _number(record["test"][best]) for _, seed, record in group},
    )


def _number(value: float | None) -> float:
    """Undo what a record does to numbers that are not finite."""
    return float("inf") if value is None else value
