"""Figures: surfaces with paths, where starts end, ellipses, the patchwork network."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from andmask_ext import plots
from andmask_ext.metrics import landscapes
from andmask_ext.plots import palette
from andmask_ext.plots.style import LINES, WIDTH, style

from ..figures import save
from ..summary import Picture
from . import patchwork
from .parts import LR, PAIRS, RULES
from .results import RHO, Results

STARTS = ((-2.7, -0.5), (0.2, 2.7), (-1.2, -1.6), (2.7, -2.2), (0.7, -2.8), (2.3, 1.3))
NAMES = {**{rule: rule for rule in RULES}, "and-mask": "AND-mask", "mean": "mean gradient"}
LOOKS = {  # of starts, by where they lead, and of the minimum there
    "consistent": (palette.BLUE, "*", "consistent minimum, and starts that lead there"),
    "patchwork": (palette.VERMILION, "X", "patchwork minimum, likewise"),
    "elsewhere": (palette.GREY, "o", "starts that lead to neither"),
}


def draw_surfaces(folder: Path) -> Picture:
    """Draw both losses and their means, and paths of two rules.

    Args:
        folder: where the figure goes.
    """
    surface = landscapes.two_minima()
    starts = torch.tensor(STARTS, dtype=torch.float64)
    paths = {
        name: plots.descend(surface.losses, starts, RULES[rule], LR, 250)
        for name, rule in (("AND-mask", "and-mask"), ("mean gradient", "mean"))
    }
    figure = Figure(figsize=(WIDTH, 2.75), layout="constrained")
    with style():
        panels = list(figure.subplots(1, 4, sharex=True, sharey=True))
        plots.loss_landscapes(
            surface.losses, surface.bounds, points=surface.points, paths=paths, ax=panels
        )
        legend = panels[-1].get_legend()
        handles = legend.legend_handles
        names = [text.get_text() for text in legend.get_texts()]
        legend.remove()
        for axes in panels:
            axes.label_outer()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    path = save(figure, folder / "landscape-surfaces.png")
    return Picture(
        path,
        "Losses of two environments and their means. Pooled, both minima look alike; only one is a "
        "minimum in each environment. Paths from the same six starts.",
    )


def draw_ends(results: Results, folder: Path) -> Picture:
    """Draw all starts, coloured by where they end.

    Args:
        results: of all runs.
        folder: where the figure goes.
    """
    surface = landscapes.two_minima()
    left, right, low, high = surface.bounds
    x, y = np.meshgrid(np.linspace(left, right, 121), np.linspace(low, high, 121))
    grid = torch.from_numpy(np.stack((x, y)))
    pooled = torch.stack([loss(grid) for loss in surface.losses]).mean(0)
    figure = Figure(figsize=(WIDTH, 2.75), layout="constrained")
    with style():
        panels = figure.subplots(1, len(RULES), sharex=True, sharey=True)
        for axes, rule in zip(panels, RULES, strict=True):
            axes.contour(
                x, y, pooled, np.linspace(0, 1, 9)[1:] ** 2 * 4, colors="#CCCCCC", linewidths=0.6
            )
            records = results.descents(rule)
            starts = np.concatenate([record["starts"] for record in records])
            ends = np.concatenate([record["ends"] for record in records])
            for place, (colour, marker, _) in LOOKS.items():
                size = min(12.0, 4000 / len(starts))
                axes.scatter(*starts[ends == place].T, s=size, color=colour, linewidths=0)
                if place in surface.points:
                    axes.plot(*surface.points[place], marker, color=colour, mec="white", ms=13)
            axes.set(
                aspect="equal",
                title=NAMES[rule],
                xlabel=r"$\theta_1$",
                xlim=(left, right),
                ylim=(low, high),
            )
            axes.title.set_fontsize(9.5)
        panels[0].set_ylabel(r"$\theta_2$")
        handles = [
            Line2D([], [], linestyle="", marker=marker, color=colour, ms=7, label=label)
            for colour, marker, label in LOOKS.values()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    path = save(figure, folder / "landscape-ends.png")
    lost = {rule: statistics.mean(results.share(rule, "patchwork")) for rule in RULES}
    return Picture(
        path,
        "Every dot is a start, coloured by where descent leads. To the patchwork minimum lead "
        + ", ".join(f"{share:.0f} % ({NAMES[rule]})" for rule, share in lost.items())
        + ".",
    )


def draw_ellipses(results: Results, folder: Path) -> Picture:
    """Draw level sets of pairs of quadratics and of their means.

    Args:
        results: of all runs.
        folder: where the figure goes.
    """
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    with style():
        panels = list(figure.subplots(1, len(PAIRS), sharex=True, sharey=True))
        for axes, (name, hessians) in zip(panels, PAIRS.items(), strict=True):
            plots.ellipses(torch.tensor(hessians, dtype=torch.float64), ax=axes)
            one = results.quadratics[name]
            axes.set_title(
                f"{name}\n{RHO} = {one['determinants']:.3g}, score {one['score']:.3g} ε",
                fontsize=9.5,
            )
            axes.label_outer()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    path = save(figure, folder / "landscape-ellipses.png")
    return Picture(
        path,
        "Where the losses of two quadratics are 1, and where their means are. The more the two "
        f"differ, the larger are {RHO}, the ratio of the means' determinants, and the score.",
    )


def draw_patchwork(results: Results, folder: Path) -> Picture:
    """Draw the staircase, the network at three points, and the score over the search's length.

    Args:
        results: of all runs.
        folder: where the figure goes.
    """
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)
    first = results.patches[0]
    found = min(first["searches"], key=lambda one: one["score"])
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    with style():
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 1.15, 1))
        curves: list[tuple[str, Any]] = [
            ("target", patchwork.target(x)),
            ("solution θ*", _network(patchwork.SOLUTION, x)),
            ("θ₆ = -.5", _network(patchwork.TURNED, x)),
            ("found by search", _network(found["witness"], x)),
        ]
        looks = ((palette.BLACK, "-"), *((line.color, line.linestyle) for line in LINES[:3]))
        for axes, shown in ((left, curves[:3]), (middle, curves)):
            for (name, values), (colour, line) in zip(shown, looks, strict=False):
                axes.plot(x, values, color=colour, linestyle=line, linewidth=1.6, label=name)
            axes.axvline(0.5, color=palette.GREY, linewidth=0.8)
            for place, name in ((0.25, "A"), (0.75, "B")):
                axes.annotate(
                    name,
                    (place, 0.97),
                    xycoords=("data", "axes fraction"),
                    ha="center",
                    va="top",
                    color=palette.GREY,
                )
            axes.set(xlabel="x", xlim=(0, 1))
        left.set(title="a part for each environment", ylabel="f(x)", ylim=(-0.7, 2.6))
        middle.set(title="the found point, other scale", yscale="symlog")
        middle.set(ylim=(-0.7, 3 * float(curves[-1][1].max())))
        middle.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for number, epsilon in enumerate(
            dict.fromkeys(one["epsilon"] for one in first["searches"])
        ):
            own = [
                [one for one in record["searches"] if one["epsilon"] == epsilon]
                for record in results.patches
            ]
            steps = [one["steps"] for one in own[0]]
            scores = np.median([[one["score"] for one in each] for each in own], axis=0)
            right.plot(
                steps, scores, **LINES[number % len(LINES)]._asdict(), label=f"ε = {epsilon:g}"
            )
        right.axhline(first["turned"][1], color=palette.GREY, linewidth=0.8)
        right.annotate(
            "θ₆ = -.5",
            (0.98, first["turned"][1]),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8.5,
            color=palette.GREY,
        )
        right.set(xscale="log", yscale="log", xlabel="steps of the search", title="score")
        right.set_xticks(steps, [str(one) for one in steps])
        right.minorticks_off()
        right.legend(loc="center right")
        handles, labels = middle.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    path = save(figure, folder / "landscape-patchwork.png")
    return Picture(
        path,
        "The patchwork example. At the found point "
        f"(ε = {found['epsilon']:g}, {found['steps']} steps) A has loss "
        f"{found['losses'][0]:.4f}, B {found['losses'][1]:.3g}. Right: scores, medians over seeds.",
    )


def _network(theta: Any, x: torch.Tensor) -> torch.Tensor:
    return patchwork.network(torch.tensor(theta, dtype=torch.float64), x)
