"""The figures: solutions of the regression, and errors on the unit tests in two bases."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from andmask_ext.plots.palette import BLUE, GREEN, GREY, ORANGE, VERMILION
from andmask_ext.plots.style import style

from ..figures import save
from .regression import ENVIRONMENTS, POINTS, RULES
from .selection import Cells
from .training import METHODS
from .unit_tests import EXAMPLES

NAMES = {
    "mean": "mean",
    "and-mask": "AND-mask",
    "fdr": "with fdr",
    "significance": "with significance",
    "geometric": "geometric mean",
    "irm": "IRMv1",
    "oracle": "oracle",
}
COLOURS = {"mean": VERMILION, "and-mask": BLUE, "geometric": GREEN}
TITLES = {
    1: "example 1: regression on\ncauses and effects",
    2: "example 2: cows and camels,\nshortcut alike everywhere",
    3: "example 3: small margin,\nshortcut differs everywhere",
}

# rule, environments -> weights of each seed, losses on seen and unseen points of each seed
Solutions = Mapping[
    tuple[str, str], tuple[Sequence[Sequence[float]], Sequence[float], Sequence[float]]
]


def draw_regression(solutions: Solutions, path: Path) -> Path:
    """Draw the weights that each rule finds, and the losses."""
    columns = list(ENVIRONMENTS)
    with style():
        figure = Figure(figsize=(8.3, 5.0), layout="constrained")
        panels = figure.subplots(2, len(columns), sharey="row", height_ratios=(1.25, 1))
        for column, environments in enumerate(columns):
            _draw_weights(panels[0, column], solutions, environments)
            _draw_losses(panels[1, column], solutions, environments)
            panels[0, column].set_title(
                f"trained on the {environments} points".replace("the all", "all")
            )
        panels[0, 0].set_ylabel("weight")
        panels[1, 0].set_ylabel("loss")
        panels[0, 0].legend(loc="upper left")
        return save(figure, path)


def _draw_weights(axes: Axes, solutions: Solutions, environments: str) -> None:
    width = 0.8 / len(RULES)
    for number, rule in enumerate(RULES):
        weights = np.array(solutions[rule, environments][0])
        places = np.arange(POINTS + 1) + (number - (len(RULES) - 1) / 2) * width
        axes.bar(places, weights.mean(0), width, color=COLOURS[rule], label=NAMES[rule])
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xticks(range(POINTS + 1), [f"$\\theta_{i + 1}$" for i in range(POINTS + 1)])
    axes.tick_params(axis="x", length=0)


def _draw_losses(axes: Axes, solutions: Solutions, environments: str) -> None:
    for number, rule in enumerate(RULES):
        _, seen, unseen = solutions[rule, environments]
        for losses, shift, marker in ((seen, -0.12, "o"), (unseen, 0.12, "s")):
            if not losses:
                continue
            filled = COLOURS[rule] if marker == "s" else "white"
            axes.plot(
                np.full(len(losses), number + shift),
                losses,
                linestyle="none",
                marker=marker,
                markersize=5,
                markeredgecolor=COLOURS[rule],
                markerfacecolor=filled,
            )
    axes.set(yscale="log", xlim=(-0.5, len(RULES) - 0.5), ylim=(1e-6, 2))
    axes.set_xticks(range(len(RULES)), [NAMES[rule].replace(" ", "\n") for rule in RULES])
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    if len(ENVIRONMENTS[environments]) < POINTS:
        axes.plot([], [], "o", color=GREY, markerfacecolor="white", label="seen points")
        axes.plot([], [], "s", color=GREY, label="unseen points")
        axes.legend(loc="lower right", borderaxespad=0.2)


def draw_unit_tests(cells: Cells, path: Path) -> Path:
    """Draw the test error of each method on each unit test, as it is and scrambled.

    Errors of example 1, whose size differs between seeds, are given as multiples of the oracle's.
    """
    rows = cells.environments
    with style():
        figure = Figure(figsize=(8.8, 1.0 + 2.5 * len(rows)), layout="constrained")
        panels = figure.subplots(len(rows), len(EXAMPLES), squeeze=False)
        for row, environments in enumerate(rows):
            for column, example in enumerate(EXAMPLES):
                _draw_example(panels[row, column], cells, example, environments)
            panels[row, 0].set_ylabel(f"{environments} environments\nerror / oracle's error")
            panels[row, 1].set_ylabel("test error")
        for column, example in enumerate(EXAMPLES):
            panels[0, column].set_title(TITLES[example])
        handles = panels[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=2)
        return save(figure, path)


def _draw_example(axes: Axes, cells: Cells, example: int, environments: int) -> None:
    oracle = cells.get(example, False, environments, "oracle").test
    for shift, scrambled, colour in ((-0.19, False, BLUE), (0.19, True, ORANGE)):
        label = "inputs scrambled" if scrambled else "inputs as they are"
        for number, method in enumerate(METHODS):
            test = cells.get(example, scrambled, environments, method).test
            errors = [test[seed] / oracle[seed] if example == 1 else test[seed] for seed in test]
            axes.bar(
                number + shift,
                statistics.mean(errors),
                0.36,
                color=colour,
                label=label if number == 0 else None,
            )
            if len(errors) > 1:
                axes.plot(
                    np.full(len(errors), number + shift),
                    errors,
                    linestyle="none",
                    marker="o",
                    markersize=2.6,
                    color="#222222",
                    alpha=0.7,
                )
    level, text = (1, "oracle") if example == 1 else (0.5, "chance")
    axes.axhline(level, color=GREY, linewidth=1, linestyle=":")
    if example != 1:
        axes.text(len(METHODS) - 0.5, level + 0.01, text, color=GREY, ha="right", va="bottom")
        axes.set_ylim(0, 0.58)
    axes.set_xticks(
        range(len(METHODS)),
        [NAMES[method].removesuffix(" mean") for method in METHODS],
        rotation=35,
        ha="right",
        rotation_mode="anchor",
    )
    axes.tick_params(axis="x", length=0)
