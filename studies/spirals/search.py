"""A random search for every method with the same budget, and the best of each again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import search
from ..study import Run
from ..summary import Claim, Picture, Summary, Table, spread
from . import charts, options
from .parts import AND_FAMILY, PASSED, Done, Part, SpiralsRun, mean_of, notes_on_shortcuts, percents
from .settings import METHODS

TRIALS, QUICK_TRIALS = 16, 2
EPOCHS, REVOLUTIONS = 20, 1.0

# The paper's ranges, but for the width (it has 256 and 512) and the depth (3 and 5).
SPACE: dict[str, tuple[Any, ...]] = {
    "width": (64, 128),
    "batch": (64, 128, 256),
    "optimizer": ("adam", "sgd"),
    "lr": (1e-3, 1e-2, 1e-1),
}
# Of those settings that only some methods have. The paper prints no ranges for tau (it found 1 to
# be best), for rescaling, nor for the weight of DANN; the SAND-mask, masked averaging and
# gradient agreement filtering are not in it.
OWN: dict[str, tuple[Any, ...]] = {
    "dropout": (0.5,),
    "l1": (1e-6, 1e-5, 1e-4),
    "l2": (1e-5, 1e-4, 1e-3),
    "penalty": (10.0, 100.0, 1000.0),
    "anneal": (0, 1, 2, 4, 8),
    "reversal": (0.1, 1.0, 10.0),
    "tau": (0.6, 0.8, 0.9, 1.0),
    "rescale": (False, True),
    "sharpness": (1.0, 10.0, 100.0),
    "cos_distance": (0.9, 0.95, 0.97, 1.0),  # as its authors recommend
    "halve": (False, True),
}
SAND_TAU = (0.4, 0.6, 0.8, 0.9)  # with 1 nothing passes


class Search(Part):
    """Settings are chosen on validation data, for all methods alike, and shown on test data."""

    def plan(self, chosen: argparse.Namespace) -> list[SpiralsRun]:
        """Turn options into the trials; all have the first of the seeds."""
        trials = chosen.trials or (QUICK_TRIALS if chosen.quick else TRIALS)
        changes: dict[str, Any] = (
            {} if chosen.quick else {"revolutions": REVOLUTIONS, "epochs": EPOCHS}
        )
        base = options.base(chosen, **changes)
        return [
            Run(f"{method} trial={number}", replace(base, method=method, **drawn), chosen.seeds[0])
            for method in chosen.method or METHODS
            for number, drawn in enumerate(
                search.draw(_space(method, options.given(chosen)), trials, seed=0)
            )
        ]

    def follow_up(
        self, finished: Sequence[Done], chosen: argparse.Namespace
    ) -> Sequence[SpiralsRun]:
        """Return the best trial of each method, to be run with the other seeds."""
        return [
            Run(f"{method} best", _best(trials).run.settings, seed)
            for method, trials in _by_method(finished).items()
            for seed in chosen.seeds[1:]
        ]

    def present(self, finished: Sequence[Done], folder: Path, name: str) -> Summary:
        """Say what the runs come to."""
        trials = _by_method([one for one in finished if not one.run.label.endswith(" best")])
        again = _by_method([one for one in finished if one.run.label.endswith(" best")])
        best = {method: _best(runs) for method, runs in trials.items()}
        rows = [
            (
                method,
                len(runs),
                sum(one.record["final"]["test_accuracy"] >= PASSED for one in runs),
                sum(one.record["final"]["train_accuracy"] >= PASSED for one in runs),
                percents([best[method]], "validation")[0],
                spread(percents(again.get(method, []), "train")),
                spread(percents(again.get(method, []), "test")),
            )
            for method, runs in trials.items()
        ]
        columns = (
            "method",
            "trials",
            "≥ 95 % test",
            "≥ 95 % train",
            "best, validation %",
            "again, train %",
            "again, test %",
        )
        first = next(iter(best.values())).run.settings
        path = charts.draw_search(trials, best, again, folder / f"{name}.png")
        return Summary(
            _claims(again),
            [
                Table(f"random search, {first.revolutions:g} revolution(s)", columns, rows),
                Table(
                    "settings of the best",
                    ("method", "settings"),
                    [(method, _settings(one)) for method, one in best.items()],
                ),
            ],
            [
                Picture(
                    path,
                    "Final accuracy of all trials of the random search: box from quartile to "
                    "quartile, line at the median, a dot for each trial. Diamonds: the trial that "
                    "was best on validation data, run again with other seeds.",
                )
            ],
            [
                "Sized for two cores: widths of 64 and 128 and three layers where the paper has "
                f"256 and 512, three and five; {first.epochs} epochs.",
                "Every method is helped in the same way: its best trial is chosen by a validation "
                "set without the shortcut, drawn like the test set from another random stream.",
                *notes_on_shortcuts(finished),
            ],
        )


def _space(method: str, given: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    own = {name: OWN[name] for name in METHODS[method] if name in OWN}
    if method == "sand-mask":
        own["tau"] = SAND_TAU
    return {name: values for name, values in (SPACE | own).items() if name not in given}


def _by_method(finished: Sequence[Done]) -> dict[str, list[Done]]:
    groups: dict[str, list[Done]] = {}
    for one in finished:
        groups.setdefault(one.run.settings.method, []).append(one)
    return groups


def _best(trials: Sequence[Done]) -> Done:
    """Return the trial with the best validation accuracy; of several, the one that fits best."""

    def score(one: Done) -> tuple[float, float]:
        final = one.record["final"]
        loss = final["loss"]  # null if it was not a number
        return final["validation_accuracy"], float("-inf") if loss is None else -loss

    return max(trials, key=score)


def _settings(one: Done) -> str:
    settings = one.run.settings
    names = [*SPACE, *(name for name in METHODS[settings.method] if name in OWN)]
    return " ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name in names
        for value in [getattr(settings, name)]
    )


def _claims(again: dict[str, list[Done]]) -> list[Claim]:
    if not again:
        return []
    test = {method: mean_of(runs, "test") for method, runs in again.items()}
    inside = {method: share for method, share in test.items() if method in AND_FAMILY}
    outside = {method: share for method, share in test.items() if method not in AND_FAMILY}
    claims = [
        Claim(
            f"{method}, at its best, passes 95 % on test data",
            share >= PASSED,
            f"{100 * share:.1f} %",
        )
        for method, share in inside.items()
    ]
    if outside:
        most = max(outside, key=lambda method: outside[method])
        claims.append(
            Claim(
                f"only the AND family ({', '.join(inside) or 'none run'}) passes 95 % on test data",
                outside[most] < PASSED and any(share >= PASSED for share in inside.values()),
                f"best of the others: {most}, {100 * outside[most]:.1f} %",
            )
        )
    return claims
