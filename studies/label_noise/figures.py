"""The figures of the study: accuracies over epochs, for each threshold and method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from andmask_ext.plots.palette import BLUE, GREY, VERMILION
from andmask_ext.plots.style import LINES, SMALL, style

from ..figures import Array, save

Curves = Array  # [seeds, epochs], shares


def draw_random_labels(
    curves: Mapping[str, Mapping[float, Curves]], chance: float, path: Path
) -> Path:
    """Draw the training accuracy over epochs for each threshold, and over thresholds at the end."""
    with style():
        figure = Figure(figsize=(10.4, 3.7), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        taus = sorted({tau for one in curves.values() for tau in one})
        colours = dict(
            zip(taus, colormaps["viridis"](np.linspace(0, 0.88, len(taus))), strict=True)
        )
        for axes, labels in zip(panels, ("true", "random"), strict=False):
            for tau, series in curves[labels].items():
                _curve(axes, series, colours[tau], "-", rf"{tau:g}", band=False)
            axes.set(xlabel="epoch", title=f"{labels} labels")
        panels[0].set_ylabel("accuracy on training data (%)")
        panels[1].legend(title=r"$\tau$", loc="upper left", bbox_to_anchor=(1.0, 1.0))
        for labels, colour, marker in (("true", BLUE, "o"), ("random", VERMILION, "s")):
            _over_taus(panels[2], curves[labels], colour, marker, f"{labels} labels")
        panels[2].set(xlabel=r"agreement threshold $\tau$", title="after the last epoch")
        panels[2].legend(loc="best")
        panels[2].tick_params(labelleft=True)
        for axes in panels:
            _chance(axes, chance, named=axes is panels[0])
    return save(figure, path)


def _over_taus(
    axes: Axes, series: Mapping[float, Curves], colour: str, marker: str, label: str
) -> None:
    taus = np.array(sorted(series))
    final = [100 * series[tau][:, -1] for tau in taus]
    means = [one.mean() for one in final]
    line = "-" if len(taus) > 2 else "none"  # between two points it would claim a slope
    axes.plot(taus, means, linestyle=line, color=colour, marker=marker, label=label)
    for tau, values in zip(taus, final, strict=True):
        axes.plot([tau] * len(values), values, ".", color=colour, alpha=0.5)


def draw_label_noise(
    rows: Mapping[str, Mapping[str, tuple[Curves, Curves]]], chance: float, path: Path
) -> Path:
    """Draw the accuracy on mislabeled and on test images over epochs."""
    with style():
        figure = Figure(figsize=(8.3, 0.6 + 3.1 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), 2, squeeze=False, sharex=True)
        titles = ("wrong labels reproduced", "test images right")
        for (row, methods), panels in zip(rows.items(), grid, strict=True):
            for column, (axes, title) in enumerate(zip(panels, titles, strict=True)):
                for (method, series), line in zip(methods.items(), _lines(methods), strict=True):
                    name = method.replace("tau=", r"$\tau=$")
                    _curve(axes, series[column], line[0], line[1], name)
                axes.set_title(f"{title}: {row}" if len(rows) > 1 else title)
            _chance(panels[0], chance, named=False)
            panels[1].set_ylim(50, 101)
            panels[0].set_ylabel("accuracy (%)")
        for axes in grid[-1]:
            axes.set_xlabel("epoch")
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    return save(figure, path)


def _lines(methods: Mapping[str, Any]) -> Sequence[tuple[str, Any]]:
    """Return colour and dashes of each method: plain Adam is vermilion, wherever it stands."""
    masks = iter([line for line in LINES if line.color != VERMILION] * len(methods))
    lines = []
    for method in methods:
        plain = method == "Adam"
        line = next(masks) if not plain else None
        lines.append((line.color, line.linestyle) if line else (VERMILION, (0, (5, 2))))
    return lines


def _curve(
    axes: Axes, series: Curves, colour: Any, dashes: Any, label: str, band: bool = True
) -> None:
    """Draw the mean over seeds, and between which values they lie."""
    epochs = np.arange(1, series.shape[1] + 1)
    values = 100 * series
    axes.plot(epochs, values.mean(0), color=colour, linestyle=dashes, linewidth=1.9, label=label)
    if band and len(series) > 1:
        axes.fill_between(
            epochs, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0
        )


def _chance(axes: Axes, chance: float, named: bool) -> None:
    axes.axhline(100 * chance, color=GREY, linewidth=1, linestyle=":", zorder=0)
    axes.set_ylim(-2, 102)
    if not named:  # where curves run along the line, or its name is nearby
        return
    axes.annotate(
        "guessing",
        (1, 100 * chance),
        (-2, -3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color=GREY,
        fontsize=SMALL,
        ha="right",
        va="top",
    )
