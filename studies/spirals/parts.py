"""What the parts of the study share."""

from __future__ import annotations

import argparse
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ..study import Finished, Run
from ..summary import Summary
from .settings import METHODS, Settings

SpiralsRun: TypeAlias = Run[Settings]
Done: TypeAlias = Finished[Settings]

PASSED = 0.95  # test accuracy from which on a network has found the spirals
CHANCE = 0.70  # test accuracy below which it certainly has not

# Rules that hold an update back where the environments disagree.
AND_FAMILY = ("and-mask", "geometric-mean", "sand-mask")


class Part(ABC):
    """One question of the study: its runs, and what they come to; see :class:`..study.Study`."""

    @abstractmethod
    def plan(self, options: argparse.Namespace) -> list[SpiralsRun]:
        """Turn options into runs."""

    def follow_up(
        self, finished: Sequence[Done], options: argparse.Namespace
    ) -> Sequence[SpiralsRun]:
        """Return runs that depend on what others found."""
        return ()

    @abstractmethod
    def present(self, finished: Sequence[Done], folder: Path, name: str) -> Summary:
        """Say what the runs come to; ``name`` starts the names of the figures."""


def label(settings: Settings, environments: bool = False) -> str:
    """Name a run's place in a grid, such as ``and-mask tau=0.8 revolutions=2``."""
    words = [settings.method]
    if "tau" in METHODS[settings.method]:
        words += [
            f"{name}={level:g}" if isinstance(level, float) else f"{name}={level}"
            for name, level in settings.threshold.items()
        ]
    words.append(f"revolutions={settings.revolutions:g}")
    if environments:
        words.append(f"environments={settings.environments}")
    return " ".join(words)


def without_repetition(runs: Iterable[SpiralsRun]) -> list[SpiralsRun]:
    """Drop runs that differ in nothing that decides them: plain training's for every tau."""
    found: dict[Any, SpiralsRun] = {}
    for run in runs:
        found.setdefault((tuple(run.settings.identity().items()), run.seed), run)
    return list(found.values())


def grouped(finished: Iterable[Done]) -> dict[str, list[Done]]:
    """Return the runs of each label, in the order of first appearance."""
    groups: dict[str, list[Done]] = {}
    for one in finished:
        groups.setdefault(one.run.label, []).append(one)
    return groups


def percents(finished: Iterable[Done], which: str) -> list[float]:
    """Return a final accuracy of each run, in per cent."""
    return [100 * one.record["final"][f"{which}_accuracy"] for one in finished]


def mean_of(finished: Iterable[Done], which: str) -> float:
    """Return the mean of a final accuracy, as a share."""
    return statistics.mean(percents(finished, which)) / 100


def notes_on_shortcuts(finished: Iterable[Done]) -> list[str]:
    """Return a note for each draw in which a vote lets a shortcut pass.

    By chance enough environments agree on the sign of a shortcut dimension now and then. The rule
    is right to keep it; the test is then not fair.
    """
    notes = []
    for one in finished:
        settings, vote = one.run.settings, one.record["largest_shortcut_vote"]
        votes = "tau" in METHODS[settings.method] and "tau" in settings.threshold
        if votes and vote >= settings.tau * settings.environments - 1e-6:
            notes.append(
                f"note: seed {one.run.seed}: by chance the environments agree, with {vote} net "
                f"votes of {settings.environments}, on the sign of a shortcut dimension; with "
                f"tau {settings.tau:g} it passes"
            )
    return list(dict.fromkeys(notes))
