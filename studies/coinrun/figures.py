"""The figures of the study: curves, the search with what it led to, a sheet of played levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from andmask_ext.plots.palette import BLACK, BLUE, GREY, VERMILION
from andmask_ext.plots.style import SMALL, style

from ..figures import save
from .data import States
from .player import Played
from .results import Done, Finals, best_trial, of, value
from .settings import METHODS, REFERENCES

COLOURS = {"adam": VERMILION, "temporal": BLUE}
LOOKS: tuple[tuple[str, Any], ...] = (("unseen levels", "-"), ("training levels", (0, (4, 2))))
COLUMNS = 10  # frames of a level


def draw_curves(final: Finals, constant: Sequence[float], path: Path) -> Path:
    """Draw loss and accuracy over steps."""
    with style():
        figure = Figure(figsize=(8.3, 3.6), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, what, scale in zip(panels, ("loss", "accuracy"), (1, 100), strict=True):
            for method, runs in final.items():
                _curves(axes, runs, what, scale, COLOURS[method])
            axes.set_xlabel("steps, each on one level")
            axes.set_xlim(left=0)
        panels[0].set_ylabel("KL(expert ‖ clone)")
        losses = [loss for runs in final.values() for run in runs for loss in _after_start(run)]
        panels[0].set_ylim(0, min(2.2 * constant[1], max(1.15 * constant[1], *losses)))
        panels[0].axhline(constant[1], color=GREY, linewidth=1, linestyle=":")
        panels[1].set_ylabel("clone's choice is an expert's best (%)")
        handles = [
            Line2D([], [], color=COLOURS[method], linewidth=2.2, label=METHODS[method])
            for method in final
        ]
        handles += [
            Line2D([], [], color=GREY, linewidth=2, linestyle=dashes, label=name)
            for name, dashes in LOOKS
        ]
        handles.append(
            Line2D(
                [], [], color=GREY, linewidth=1, linestyle=":", label="the frame ignored, unseen"
            )
        )
        figure.legend(handles=handles, loc="outside lower center", ncols=5, columnspacing=1.2)
        return save(figure, path)


def _curves(axes: Axes, runs: Sequence[Done], what: str, scale: float, colour: str) -> None:
    for split, (_, dashes) in zip(("test", "train"), LOOKS, strict=True):
        histories = [run.record["history"] for run in runs]
        each = scale * np.array([one[f"{split}_{what}"] for one in histories], float)
        steps = np.array(histories[0]["epoch"]) * runs[0].record["levels"]
        for one in each:
            axes.plot(steps, one, color=colour, linestyle=dashes, linewidth=0.7, alpha=0.4)
        axes.plot(steps, each.mean(0), color=colour, linestyle=dashes, linewidth=2.2)


def _after_start(run: Done) -> list[float]:
    history = run.record["history"]
    both = [*history["test_loss"][1:], *history["train_loss"][1:]]
    return [1.05 * loss for loss in both if loss is not None]


def draw_search(finished: Sequence[Done], final: Finals, unseen: States, path: Path) -> Path:
    """Draw the loss of every trial, and the levels that policies solve."""
    with style():
        figure = Figure(figsize=(8.3, 3.4), layout="constrained")
        trials, solved = figure.subplots(1, 2, width_ratios=(1, 1.35))
        highest = max(
            (value(one, "validation_loss") for m in METHODS for one in of(finished, "trial", m)),
            default=1.0,
        )
        _trials(trials, finished, highest)
        bars = [("the expert", [float(unseen.rewards.mean())], BLACK)]
        bars += [
            (METHODS[method], [value(one, "test_return") for one in runs], COLOURS[method])
            for method, runs in reversed(list(final.items()))
        ]
        bars += [
            (name, [value(one, "test_return") for one in of(finished, "reference", key)], GREY)
            for key, name in REFERENCES.items()
        ]
        for row, (_, values, colour) in enumerate(bars):
            shares = 10 * np.array(values)
            solved.barh(row, shares.mean(), color=colour, alpha=0.35, height=0.6)
            solved.plot(
                shares, np.full(len(shares), row), "o", color=colour, markersize=5, clip_on=False
            )
            solved.text(103, row, f"{shares.mean():.0f} %", va="center", fontsize=9)
        solved.set_yticks(range(len(bars)), [name for name, _, _ in bars])
        solved.invert_yaxis()
        solved.set(xlim=(0, 100), xlabel=f"of {len(unseen.levels)} unseen levels, solved (%)")
        return save(figure, path)


def _trials(axes: Axes, finished: Sequence[Done], highest: float) -> None:
    for column, method in enumerate(METHODS):
        runs = of(finished, "trial", method)
        losses = np.array([value(one, "validation_loss") for one in runs])
        shift = np.linspace(-0.18, 0.18, len(runs)) if len(runs) > 1 else np.zeros(1)
        for number, (x, loss) in enumerate(zip(column + shift, losses, strict=True)):
            marker, size = ("o", 6) if number else ("D", 7)
            axes.plot(x, loss, marker, color=COLOURS[method], markersize=size, alpha=0.85)
        best = int(np.argmin(losses))
        assert runs[best] is best_trial(finished, method)
        axes.plot(
            column + shift[best],
            losses[best],
            "o",
            markersize=13,
            markerfacecolor="none",
            markeredgecolor=BLACK,
        )
    axes.set_xticks(
        range(len(METHODS)), [name.replace(" AND", "\nAND") for name in METHODS.values()]
    )
    axes.set(xlim=(-0.5, len(METHODS) - 0.5), ylabel="KL on validation levels")
    if np.isfinite(highest):
        axes.set_ylim(0, 1.08 * highest)


def draw_sheet(shown: Mapping[str, Played], levels: Sequence[int], path: Path) -> Path:
    """Draw frames of levels as policies play them."""
    rows = len(levels) * len(shown)
    with style():
        figure = Figure(figsize=(8.3, 0.78 * rows + 0.1 * len(levels)), layout="constrained")
        parts = figure.subfigures(len(levels), 1, squeeze=False)[:, 0]
        for place, (part, level) in enumerate(zip(parts, levels, strict=True)):
            part.suptitle(f"level {level}", fontsize=10, x=0.005, ha="left")
            grid = part.subplots(len(shown), COLUMNS, squeeze=False)
            for line, (name, played) in zip(grid, shown.items(), strict=True):
                _strip(line, name, played, place)
        return save(figure, path)


def _strip(line: Sequence[Axes], name: str, played: Played, place: int) -> None:
    last = int(played.decisions[place]) - 1
    moments = np.unique(np.linspace(0, last, len(line)).round().astype(int))
    for axes in line[len(moments) :]:
        axes.set_axis_off()
    for axes, moment in zip(line, moments, strict=False):
        axes.imshow(played.frames[moment][place].permute(1, 2, 0).numpy())
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_xlabel(f"{moment}", fontsize=7, labelpad=1)
    reward = played.rewards[place]
    end = "coin" if reward > 0 else "dead" if played.over[place] else "not there"
    line[0].set_ylabel(
        f"{name}\n{end}: {reward:.0f}", rotation=0, ha="right", va="center", fontsize=SMALL
    )
