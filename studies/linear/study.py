"""The study ``linear``: what is run, and what it comes to."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..records import RunFiles
from ..study import Finished, Outcome, Report, Run, Settings, Study
from ..summary import Claim, Picture, Summary, Table, spread
from .figures import NAMES, Solutions, draw_regression, draw_unit_tests
from .regression import (
    ENVIRONMENTS,
    POINTS,
    RULES,
    STORED,
    RegressionSettings,
    run_regression,
    stored_outcome,
)
from .selection import Cells
from .training import METHODS, MOST_TRIALS, UnitTestSettings, run_unit_test
from .unit_tests import EXAMPLES

# Outcomes are printed with five decimals. An error of half of the last one in the recovered start
# comes back ninefold in the shared weight.
_ROUNDING, _ROUNDING_LOSS = 5e-5, 1e-6
# Shares of wrong answers: as good as, worse than, solved, near chance.
_NEAR, _FAR, _SOLVED, _CHANCE = 0.02, 0.1, 0.2, 0.4


class Linear(Study[Settings]):
    """The authors' regression and the linear unit tests."""

    name = "linear"
    title = "Linear models: a regression with two solutions, and unit tests in two bases"
    about = (
        "Repeat the authors' linear regression, beside the outcomes stored in their notebook, and "
        "run the linear unit tests, as they are and with rotated inputs."
    )
    reference = (
        "code released with Parascandolo et al., ICLR 2021 (linear regression); Aubin et al., "
        "Linear unit-tests for invariance discovery, 2021, arXiv 2102.10867"
    )
    unit = "step"
    packages = (*Study.packages, "scikit-learn")  # draws the settings that are tried

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the parts and the sizes of the unit tests."""
        parser.add_argument("--part", choices=("regression", "unit-tests"), help="default: both")
        tests = parser.add_argument_group("the unit tests")
        tests.add_argument(
            "--environments", type=int, nargs="+", metavar="N", help="default: 3 10 (--quick: 10)"
        )
        tests.add_argument(
            "--samples",
            type=int,
            metavar="N",
            help="examples in each environment (default: 1000; --quick: 500)",
        )
        tests.add_argument(
            "--iterations",
            type=int,
            metavar="N",
            help="steps of full-batch Adam (default: 2000; --quick: 300)",
        )
        tests.add_argument(
            "--trials",
            type=int,
            metavar="N",
            help="settings tried for each method (default: 12; --quick: 4)",
        )

    def plan(self, options: argparse.Namespace) -> Sequence[Run[Settings]]:
        """All rules and environments of the regression, all methods and unit tests."""
        quick = options.quick
        if options.part == "regression":
            for name in ("environments", "samples", "iterations", "trials"):
                if (value := getattr(options, name)) is not None:
                    raise ValueError(f"{name}: expected none with part regression, got {value}")
        sizes = {
            name: default if getattr(options, name) is None else getattr(options, name)
            for name, default in (
                ("samples", 500 if quick else 1000),
                ("iterations", 300 if quick else 2000),
                ("trials", 4 if quick else 12),
            )
        }
        environments = options.environments or ([10] if quick else [3, 10])
        for name, least in (("samples", 2), ("iterations", 1), ("trials", 1)):
            if sizes[name] < least:
                raise ValueError(f"{name}: expected at least {least}, got {sizes[name]}")
        if sizes["trials"] > MOST_TRIALS:
            raise ValueError(
                f"trials: expected at most the {MOST_TRIALS} settings that there are, got "
                f"{sizes['trials']}"
            )
        if min(environments) < 3:
            raise ValueError(f"environments: expected at least 3, got {min(environments)}")
        runs: list[Run[Settings]] = []
        if options.part != "unit-tests":
            runs += [
                Run(
                    f"notebook {s.rule} {s.environments}",
                    _regression(s.rule, s.environments, True),
                    0,
                )
                for s in STORED
            ]
            runs += [
                Run(f"regression {rule} {which}", _regression(rule, which), seed)
                for rule in RULES
                for which in ENVIRONMENTS
                for seed in options.seeds
            ]
        if options.part != "regression":
            runs += [
                Run(
                    f"example {example}{'s' if scrambled else ''} {count} environments {method}",
                    UnitTestSettings(example, scrambled, count, method, **sizes),
                    seed,
                )
                for count in dict.fromkeys(environments)
                for example in EXAMPLES
                for scrambled in (False, True)
                for method in METHODS
                for seed in options.seeds
            ]
        return runs

    def execute(self, settings: Settings, seed: int, files: RunFiles, report: Report) -> Outcome:
        """Do one run of either part."""
        if isinstance(settings, RegressionSettings):
            return run_regression(settings, seed)
        assert isinstance(settings, UnitTestSettings)
        return run_unit_test(settings, seed, report)

    def summary_name(self, options: argparse.Namespace) -> str:
        """One part alone has a summary of its own."""
        return f"{self.name}-{options.part}" if options.part else self.name

    def present(
        self, finished: Sequence[Finished[Settings]], folder: Path, options: argparse.Namespace
    ) -> Summary:
        """Claims, tables and a figure of each part."""
        summary = Summary()
        start = self.summary_name(options)  # a part alone leaves the figures of the whole alone
        if options.part != "unit-tests":
            _present_regression(summary, finished, folder / f"{start}-solutions.png")
        if options.part != "regression":
            _present_unit_tests(summary, Cells(finished), folder / f"{start}-errors.png")
        return summary


def _regression(rule: str, environments: str, stored: bool = False) -> RegressionSettings:
    return RegressionSettings(rule, environments, stored)


def _present_regression(
    summary: Summary, finished: Sequence[Finished[Settings]], picture: Path
) -> None:
    rows: list[tuple[str | float, ...]] = []
    distances, losses = [], []
    solutions: dict[tuple[str, str], tuple[list[list[float]], list[float], list[float]]] = {}
    for one in finished:
        settings, record = one.run.settings, one.record
        if not isinstance(settings, RegressionSettings):
            continue
        theta, final = record["theta"], record["final"]
        key = (settings.rule, settings.environments)
        if settings.stored:
            stored = stored_outcome(*key)
            distance = max(abs(a - b) for a, b in zip(theta, stored.theta, strict=True))
            distances.append(distance)
            losses.append(abs(final["seen_loss"] - stored.loss))
            shown = [f"{value:.5f}" for value in (stored.theta[-1], theta[-1])]
            shown += [f"{value:.6f}" for value in (stored.loss, final["seen_loss"])]
            rows.append((*key, *shown, f"{distance:.0e}"))
        else:
            thetas, seen, unseen = solutions.setdefault(key, ([], [], []))
            thetas.append(theta)
            seen.append(final["seen_loss"])
            unseen += [] if final["unseen_loss"] is None else [final["unseen_loss"]]
    summary.tables += [
        Table(
            "the notebook's stored outcomes, and ours from the starts they imply",
            ("rule", "trained on", "θ5 stored", "θ5", "loss stored", "loss", "largest gap of θ"),
            rows,
        ),
        Table(
            "from random starts: weights and losses, mean ± standard deviation over seeds",
            ("rule", "trained on", "θ1", "θ4", "θ5", "loss, seen points", "loss, unseen points"),
            [
                (
                    *key,
                    *(spread([theta[i] for theta in thetas], 3) for i in (0, POINTS - 1, POINTS)),
                    spread(seen, 6),
                    spread(unseen, 4),
                )
                for key, (thetas, seen, unseen) in solutions.items()
            ],
        ),
    ]
    unseen_of = {
        rule: [loss for (name, _), found in solutions.items() if name == rule for loss in found[2]]
        for rule in RULES
    }
    summary.claims += [
        Claim(
            "the outcomes stored in the authors' notebook are met to "
            f"{_ROUNDING:.0e}, what rounding of the printed weights allows",
            max(distances) < _ROUNDING and max(losses) < _ROUNDING_LOSS,
            f"of {len(distances)} runs, weights differ by {max(distances):.0e} at most, losses by "
            f"{max(losses):.0e}; of the masked rules θ5 and the losses decide (the start is taken "
            "from the other weights)",
        ),
        Claim(
            "trained on two points, the mean fails on the other two",
            min(unseen_of["mean"]) > 0.1,
            f"loss {spread(unseen_of['mean'], 3)} there, from random starts",
        ),
        Claim(
            "trained on two points, AND-mask and geometric mean fit the other two",
            max(unseen_of["and-mask"] + unseen_of["geometric"]) < 0.05,
            f"loss {spread(unseen_of['and-mask'], 4)} and {spread(unseen_of['geometric'], 4)}",
        ),
    ]
    summary.pictures.append(_regression_picture(solutions, picture))


def _regression_picture(solutions: Solutions, path: Path) -> Picture:
    return Picture(
        draw_regression(solutions, path),
        "Weights that each rule finds (mean over seeds), and losses of each seed. The mean gives "
        "every point that it has seen a weight of its own, and has none for the others; the masked "
        "rules use the input that all share, trained on whichever points.",
    )


def _present_unit_tests(summary: Summary, cells: Cells, picture: Path) -> None:
    summary.tables.append(
        Table(
            "test error on the unit tests (example 1: mean squared error), mean ± standard "
            "deviation over seeds; s: scrambled",
            ("environments", "example", *(NAMES[method] for method in METHODS)),
            [
                (
                    count,
                    f"{example}{'s' if scrambled else ''}",
                    *(
                        spread(
                            cells.get(example, scrambled, count, method).test.values(),
                            2 if example == 1 else 3,
                        )
                        for method in METHODS
                    ),
                )
                for count in cells.environments
                for example in EXAMPLES
                for scrambled in (False, True)
            ],
        )
    )
    summary.claims += unit_test_claims(cells)
    summary.pictures.append(
        Picture(
            draw_unit_tests(cells, picture),
            "Test error, shortcuts shuffled: mean over seeds, each seed as a dot. To the right: "
            "where shortcuts differ between many environments, AND-mask is as good as the oracle, "
            "and at chance as soon as the inputs are rotated.",
        )
    )
    trials = {cell.method: cell.trial for cell in cells.cells if cell.example == 3}
    summary.notes.append(
        "Options of each method are chosen by random search, with the same learning rates and "
        "decays for all, on validation data of the training environments, for all seeds together; "
        "of equal ones the first. Sized for two cores: fewer examples, steps, trials and seeds "
        "than Aubin et al., and larger learning rates instead. "
        "Choices in example 3: "
        + "; ".join(f"{NAMES[m]} {trials[m]}" for m in ("and-mask", "fdr", "significance"))
        + "."
    )


def unit_test_claims(cells: Cells) -> list[Claim]:
    """Compare test errors of methods, with most environments and with fewest."""
    few, many = cells.environments[0], cells.environments[-1]

    def error(example: int, scrambled: bool, method: str, count: int = many) -> float:
        return cells.get(example, scrambled, count, method).error

    plain, turned, oracle, turned_oracle = (
        error(3, turn, method) for method in ("and-mask", "oracle") for turn in (False, True)
    )
    moved = {
        method: error(3, True, method) - error(3, False, method)
        for method in ("and-mask", "mean", "irm")
    }
    gains = [error(2, turn, "mean") - error(2, turn, "and-mask") for turn in (False, True)]
    alike = min(
        (error(2, turn, method), method, turn)
        for method in METHODS
        for turn in (False, True)
        if method != "oracle"
    )
    claims = [
        Claim(
            f"{many} environments whose shortcuts differ (example 3): AND-mask is as good as "
            "training without shortcuts",
            plain <= oracle + _NEAR and oracle < _SOLVED,
            f"test error {plain:.3f}, oracle {oracle:.3f}",
        ),
        Claim(
            "the same inputs in a rotated basis take AND-mask to chance",
            turned >= _CHANCE and max(plain, turned_oracle) < _SOLVED,
            f"test error {turned:.3f}, before {plain:.3f}; oracle {turned_oracle:.3f}",
        ),
        Claim(
            "plain training and IRMv1 lose less than half as much by it",
            moved["and-mask"] > _FAR and max(moved["mean"], moved["irm"]) < moved["and-mask"] / 2,
            ", ".join(f"{NAMES[method]} {by:+.3f}" for method, by in moved.items()),
        ),
        Claim(
            "none but the oracle solves cows and camels (example 2)",
            alike[0] > error(2, False, "oracle") + _FAR,
            f"the least test error is {alike[0]:.3f}, of {NAMES[alike[1]]} on inputs "
            f"{'scrambled' if alike[2] else 'as they are'}",
        ),
        Claim(
            f"where {many} environments share the sign of the shortcut (example 2), AND-mask is no "
            "better than the mean",
            max(gains) < _NEAR,
            f"mean {error(2, False, 'mean'):.3f} and AND-mask {error(2, False, 'and-mask'):.3f}, "
            f"scrambled {error(2, True, 'mean'):.3f} and {error(2, True, 'and-mask'):.3f}",
        ),
    ]
    if few < many:
        found = error(3, False, "and-mask", few)
        ratios = {
            method: statistics.mean(
                cells.get(1, False, few, method).test[seed] / value
                for seed, value in cells.get(1, False, few, "oracle").test.items()
            )
            for method in ("mean", "irm")
        }
        claims += [
            Claim(
                f"with {few} environments shortcuts agree by chance, and pass the vote (example 3)",
                found > oracle + _FAR,
                f"AND-mask's test error {found:.3f}",
            ),
            Claim(
                f"IRMv1 comes nearer to the oracle than plain training (example 1, {few} "
                "environments)",
                ratios["irm"] < ratios["mean"],
                f"{ratios['irm']:.2f} times the oracle's error, plain training "
                f"{ratios['mean']:.2f} times",
            ),
        ]
    return claims


main = Linear().main
