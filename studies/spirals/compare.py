"""Methods side by side in one setting, over revolutions and tau."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..study import Run
from ..summary import Claim, Picture, Summary, Table, spread
from . import charts, figures, options
from .parts import (
    AND_FAMILY,
    CHANCE,
    PASSED,
    Done,
    Part,
    SpiralsRun,
    grouped,
    label,
    mean_of,
    notes_on_shortcuts,
    percents,
    without_repetition,
)
from .settings import METHODS


class Compare(Part):
    """All combinations of methods, tau, revolutions and seeds."""

    def plan(self, chosen: argparse.Namespace) -> list[SpiralsRun]:
        """Turn options into runs."""
        base = options.base(chosen, several=("tau", "revolutions"))
        methods = chosen.method or (list(METHODS) if chosen.quick else ["mean", "and-mask"])
        return without_repetition(
            Run(label(settings), settings, seed)
            for seed, revolutions, method, tau in itertools.product(
                chosen.seeds,
                chosen.revolutions or [base.revolutions],
                methods,
                chosen.tau or [base.tau],
            )
            for settings in [replace(base, method=method, revolutions=revolutions, tau=tau)]
        )

    def present(self, finished: Sequence[Done], folder: Path, name: str) -> Summary:
        """Say what the runs come to."""
        groups = grouped(finished)
        claims, rows = [], []
        for each, runs in groups.items():
            rows.append(
                (
                    each,
                    len(runs),
                    spread(percents(runs, "train")),
                    spread(percents(runs, "test")),
                    _first_epoch(runs),
                    statistics.mean(one.record["seconds"] for one in runs),
                )
            )
            claims += _claims(each, runs)
        columns = ("method", "seeds", "train %", "test %", "epochs to 99 % test", "s per run")
        return Summary(
            claims,
            [Table("final accuracy", columns, rows)],
            self._draw(finished, folder, name),
            notes_on_shortcuts(finished),
        )

    def _draw(self, finished: Sequence[Done], folder: Path, name: str) -> list[Picture]:
        methods = {one.run.settings.method for one in finished}
        pictures = []
        if len({r.run.settings.tau for r in finished if r.run.settings.method == "and-mask"}) > 1:
            path = figures.draw_map(finished, folder / f"{name}.png")
            return [Picture(path, "Final accuracy over revolutions and tau, mean over seeds.")]
        for turns in dict.fromkeys(one.run.settings.revolutions for one in finished):
            own = [one for one in finished if one.run.settings.revolutions == turns]
            times = "revolution" if turns == 1 else "revolutions"
            if methods & set(figures.COLOURS):
                path = figures.draw_curves(own, folder / f"{name}-revolutions{turns:g}.png")
                pictures.append(
                    Picture(
                        path,
                        f"{turns:g} {times}. Left: accuracy on test (solid) and training data "
                        "(dashed). Right: what a network answers in the mechanism plane, averaged "
                        "over shortcuts drawn as at test time.",
                    )
                )
            if methods - set(figures.COLOURS):
                path = charts.draw_methods(own, folder / f"{name}-methods{turns:g}.png")
                pictures.append(
                    Picture(
                        path,
                        f"{turns:g} {times}. Final accuracy of each method; a dot is a seed.",
                    )
                )
        return pictures


def _first_epoch(runs: Sequence[Done]) -> str:
    """Say after how many epochs 99 % of the test set were right for the first time."""
    firsts = [
        next(
            (
                e
                for e, share in enumerate(one.record["history"]["test_accuracy"], 1)
                if share >= 0.99
            ),
            None,
        )
        for one in runs
    ]
    found = [first for first in firsts if first is not None]
    if not found:
        return "never"
    text = f"{min(found)}" if min(found) == max(found) else f"{min(found)} to {max(found)}"
    missing = len(firsts) - len(found)
    return f"{text}; {missing} never" if missing else text


# The paper's baselines.
MEMORISES = ("mean", "dropout", "l1", "l2", "batch-norm", "dann", "irm")


def _claims(name: str, runs: Sequence[Done]) -> list[Claim]:
    method = runs[0].run.settings.method
    train, test = mean_of(runs, "train"), mean_of(runs, "test")
    measured = f"{100 * train:.1f} % train, {100 * test:.1f} % test"
    if method in MEMORISES:
        return [Claim(f"{name} memorises", train >= PASSED and test < CHANCE, measured)]
    if method in AND_FAMILY:
        return [Claim(f"{name} finds the spirals", test >= PASSED, measured)]
    return [Claim(f"{name} does not pass 95 % on test data", test < PASSED, measured)]
