"""Figures of many runs: methods side by side, the random search, the number of environments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from andmask_ext.plots.palette import BLACK, BLUE, GREY, VERMILION
from andmask_ext.plots.style import SMALL, style

from ..figures import save
from .figures import COLOURS, NAMES
from .parts import AND_FAMILY, Done, percents

WHICH = (("train", "training accuracy (%)"), ("test", "test accuracy (%)"))


def draw_methods(runs: Sequence[Done], path: Path) -> Path:
    """Draw the final accuracies of methods, a row each."""
    methods = list(dict.fromkeys(one.run.settings.method for one in runs))
    groups = {m: [one for one in runs if one.run.settings.method == m] for m in methods}
    with style():
        figure, panels = _rows(methods)
        for axes, (which, _) in zip(panels, WHICH, strict=True):
            for row, method in enumerate(methods):
                values = percents(groups[method], which)
                axes.plot(
                    [0, float(np.mean(values))], [row, row], color="#DDDDDD", linewidth=4, zorder=1
                )
                axes.scatter(
                    values,
                    [row] * len(values),
                    s=42,
                    color=_colour(method),
                    zorder=3,
                    clip_on=False,
                )
        return save(figure, path)


def draw_search(
    trials: Mapping[str, Sequence[Done]],
    best: Mapping[str, Done],
    again: Mapping[str, Sequence[Done]],
    path: Path,
) -> Path:
    """Draw the final accuracies of all trials of each method, and of its best one again."""
    methods = list(trials)
    with style():
        figure, panels = _rows(methods)
        for axes, (which, _) in zip(panels, WHICH, strict=True):
            for row, method in enumerate(methods):
                values, colour = percents(trials[method], which), _colour(method)
                axes.boxplot(
                    values,
                    positions=[row],
                    orientation="horizontal",
                    widths=0.62,
                    showfliers=False,
                    patch_artist=True,
                    manage_ticks=False,
                    boxprops={"facecolor": colour, "alpha": 0.22, "edgecolor": colour},
                    medianprops={"color": colour, "linewidth": 2},
                    whiskerprops={"color": colour},
                    capprops={"color": colour},
                )
                shift = 0.2 * np.linspace(-1, 1, len(values)) if len(values) > 1 else np.zeros(1)
                axes.scatter(
                    values, row + shift, s=9, color=colour, alpha=0.7, linewidth=0, clip_on=False
                )
                chosen = percents(again.get(method, [best[method]]), which)
                axes.scatter(
                    chosen,
                    [row] * len(chosen),
                    marker="D",
                    s=34,
                    facecolor="white",
                    edgecolor=BLACK,
                    linewidth=1.1,
                    zorder=4,
                    clip_on=False,
                )
        handles = [
            Line2D([], [], marker="o", linestyle="", markersize=3, color=GREY, label="a trial"),
            Line2D(
                [],
                [],
                marker="D",
                linestyle="",
                markersize=5.5,
                markerfacecolor="white",
                color=BLACK,
                label="best on validation data, with other seeds" if again else "the best",
            ),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=SMALL)
        return save(figure, path)


def _rows(methods: Sequence[str]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(8.3, 1.0 + 0.29 * len(methods)), layout="constrained")
    panels = list(figure.subplots(1, 2, sharey=True))
    for axes, (_, title) in zip(panels, WHICH, strict=True):
        axes.axvline(50, color=GREY, linewidth=1, linestyle=":", zorder=0)
        axes.set(xlim=(40, 101), xlabel=title, ylim=(len(methods) - 0.4, -0.6))
        axes.set_xticks(range(40, 101, 10))
        axes.set_yticks(range(len(methods)), methods)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#EEEEEE")
        axes.set_axisbelow(True)
    for text, method in zip(panels[0].get_yticklabels(), methods, strict=True):
        text.set_color(_colour(method))
    panels[1].text(
        50,
        1.0,
        "chance",
        transform=panels[1].get_xaxis_transform(),
        color=GREY,
        fontsize=SMALL,
        ha="center",
        va="bottom",
    )
    return figure, panels


def _colour(method: str) -> str:
    return BLUE if method in AND_FAMILY else VERMILION


def draw_environments(groups: Mapping[tuple[str, int], Sequence[Done]], path: Path) -> Path:
    """Draw accuracy over the number of environments."""
    numbers = sorted({number for _, number in groups})
    with style():
        figure = Figure(figsize=(6.6, 3.7), layout="constrained")
        axes = figure.subplots()
        axes.axhline(50, color=GREY, linewidth=1, linestyle=":", zorder=0)
        for method in [method for method in COLOURS if any(m == method for m, _ in groups)]:
            own = {n: groups[method, n] for n in numbers if (method, n) in groups}
            for which, dashes in (("test", "-"), ("train", (0, (4, 2)))):
                means = [np.mean(percents(runs, which)) for runs in own.values()]
                axes.plot(
                    list(own),
                    means,
                    color=COLOURS[method],
                    linestyle=dashes,
                    linewidth=2.2 if which == "test" else 1.4,
                )
            for number, runs in own.items():
                values = percents(runs, "test")
                axes.scatter(
                    [number] * len(values),
                    values,
                    s=26,
                    color=COLOURS[method],
                    edgecolor="white",
                    linewidth=0.5,
                    zorder=3,
                    clip_on=False,
                )
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.minorticks_off()
        axes.set(xlabel="training environments", ylabel="accuracy (%)", ylim=(40, 102))
        axes.text(numbers[0], 49, "chance", color=GREY, fontsize=SMALL, va="top")
        handles = [
            Line2D([], [], color=COLOURS[method], linewidth=2.2, label=f"{NAMES[method]}, test")
            for method in COLOURS
            if any(m == method for m, _ in groups)
        ]
        handles.append(
            Line2D(
                [], [], color=GREY, linewidth=1.4, linestyle=(0, (4, 2)), label="on training data"
            )
        )
        axes.legend(handles=handles, loc="center left")
        return save(figure, path)
