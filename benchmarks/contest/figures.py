"""Bars: how much longer than plain training each way takes, and how much more memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from andmask_ext.plots import palette
from andmask_ext.plots.style import SMALL, WIDTH, style
from studies.figures import save
from studies.summary import Picture

from .contest import EVERY
from .peers import GRADIENTS, OURS, PLAIN
from .results import Results, in_words, shown

DASH = "\N{EN DASH}"
COLOURS = (palette.BLUE, palette.ORANGE, palette.GREEN, palette.PURPLE, palette.SKY)
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\")


def draw(results: Results, kind: str, folder: Path) -> Picture:
    """Draw all ways for one kind of environments, ours at the top."""
    names = [name for name in GRADIENTS if name != PLAIN]
    models = [model for model, its in results.cases if its == kind]
    places = np.arange(len(names))[::-1] * 1.0
    height = 0.8 / len(models)
    memory = any(
        results.entry(model, kind, name).memory_ratio for model in models for name in names
    )
    with style():
        figure = Figure(
            figsize=(WIDTH, 0.9 + 0.155 * len(names) * (len(models) + 1)), layout="constrained"
        )
        panels = figure.subplots(1, 1 + memory, sharey=True, squeeze=False)[0]
        titles = {
            "ratio": "time ÷ plain forward and backward",
            "memory_ratio": "peak memory ÷ that of plain",
        }
        for axes, (field, title) in zip(panels, titles.items(), strict=False):
            for rank, model in enumerate(models):
                values = [getattr(results.entry(model, kind, name), field) for name in names]
                _bars(
                    axes,
                    places + height * ((len(models) - 1) / 2 - rank),
                    values,
                    height,
                    rank,
                    model,
                )
            _finish(axes, title)
        panels[0].set_yticks(places, names)
        panels[0].get_yticklabels()[names.index(OURS)].set_fontweight("bold")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(models))
        what = in_words(kind)
        figure.suptitle(what[0].upper() + what[1:], fontsize=11)
    path = save(figure, folder / f"benchmark-{'every' if kind == EVERY else 'groups'}.png")
    caption = (
        f"{what[0].upper() + what[1:]}: what its AND-masked gradient costs in every way that "
        "exists, as multiples of one plain forward and backward pass (logarithmic). A dash: this "
        "way cannot do it, is not installed or was not run."
    )
    return Picture(path, caption)


def _bars(
    axes: Axes,
    places: np.ndarray,
    values: list[float | None],
    height: float,
    rank: int,
    model: str,
) -> None:
    axes.barh(
        places,
        [(value or 1.0) - 1.0 for value in values],
        height * 0.92,
        left=1.0,
        color=COLOURS[rank % len(COLOURS)],
        hatch=HATCHES[rank % len(HATCHES)],
        edgecolor="white",
        linewidth=0,
        label=model,
    )
    for place, value in zip(places, values, strict=True):
        text = shown(value) or DASH
        axes.annotate(
            text,
            (max(value or 1.0, 1.0), place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL - 1.5,
            color=palette.BLACK,
        )


def _finish(axes: Axes, title: str) -> None:
    axes.set(xscale="log", title=title)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="y", length=0)
    axes.margins(y=0.02)
    axes.axvline(1, color=palette.BLACK, linewidth=0.9)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.7), high * 2)
    axes.grid(axis="x", alpha=0.25)
    axes.spines["left"].set_visible(False)
