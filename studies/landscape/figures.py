"""Figures: surfaces with paths, where starts end, ellipses, the patchwork network."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter

import andmask_ext as am
from andmask_ext.plots import palette
from andmask_ext.plots.style import LINES, WIDTH, style

from ..figures import Array, save
from ..summary import Picture
from . import patchwork
from .parts import LR, PAIRS, RULES
from .results import RHO, Results
from .surfaces import BOUNDS, LOSSES, POINTS, descend

STARTS = ((-2.7, -0.5), (0.2, 2.7), (-1.2, -1.6), (2.7, -2.2), (0.7, -2.8), (2.3, 1.3))
NAMES = {**{rule: rule for rule in RULES}, "and-mask": "AND-mask", "mean": "mean gradient"}
LOOKS = {  # of starts, by where they lead, and of the minimum there
    "consistent": (palette.BLUE, "*", "consistent minimum, and starts that lead there"),
    "patchwork": (palette.VERMILION, "X", "patchwork minimum, likewise"),
    "elsewhere": (palette.GREY, "o", "starts that lead to neither"),
}


# Light enough for lines on top; low is dark, in colour and in grey.
SURFACE = LinearSegmentedColormap.from_list(
    "surface", ["#5F7391", "#94A2B5", "#C3C7C4", "#E4DDBC", "#FBF3D0"]
)
LEVELS = 13


def draw_surfaces(folder: Path) -> Picture:
    """Draw both losses and their means, and paths of two rules."""
    starts = torch.tensor(STARTS, dtype=torch.float64)
    paths = {
        name: descend(LOSSES, starts, RULES[rule], LR, 250).numpy()
        for name, rule in (("AND-mask", "and-mask"), ("mean gradient", "mean"))
    }
    x, y, grid = _grid(141)
    a, b = _values(grid)
    surfaces = {
        "environment A": a,
        "environment B": b,
        "arithmetic mean (OR)": (a + b) / 2,
        "geometric mean (AND)": np.sqrt(a * b),
    }
    values = np.stack(list(surfaces.values()))
    low, high = values.min(), np.quantile(values, 0.9)
    levels = low + (high - low) * np.linspace(0, 1, LEVELS) ** 2  # closer at low losses
    norm = BoundaryNorm(levels, SURFACE.N, extend="max")
    figure = Figure(figsize=(WIDTH, 2.75), layout="constrained")
    with style():
        panels = list(figure.subplots(1, len(surfaces), sharex=True, sharey=True))
        for axes, (title, surface) in zip(panels, surfaces.items(), strict=True):
            filled = axes.contourf(x, y, surface, levels, cmap=SURFACE, norm=norm, extend="max")
            inside = levels[(levels > surface.min()) & (levels < surface.max())]
            axes.contour(x, y, surface, inside, colors="white", linewidths=0.6, alpha=0.9)
            handles = [
                *(
                    _paths(axes, name, path, rank)
                    for rank, (name, path) in enumerate(paths.items())
                ),
                *(_point(axes, name, marker) for name, marker in zip(POINTS, "*X", strict=True)),
            ]
            axes.set(title=title, aspect="equal", xlabel=r"$\theta_1$", ylabel=r"$\theta_2$")
            axes.set(xlim=BOUNDS[:2], ylim=BOUNDS[2:])
            axes.spines[:].set_visible(True)
            axes.label_outer()
        bar = figure.colorbar(filled, ax=panels, pad=0.01, aspect=18, shrink=0.9)
        ticks = levels[:: (LEVELS - 1) // 4]
        bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
        bar.minorticks_off()
        bar.ax.tick_params(length=0, labelsize=8)
        bar.set_label("loss")
        bar.outline.set_visible(False)
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    path = save(figure, folder / "landscape-surfaces.png")
    return Picture(
        path,
        "Losses of two environments and their means. Pooled, both minima look alike; only one is a "
        "minimum in each environment. Paths from the same six starts.",
    )


def _grid(resolution: int) -> tuple[Array, Array, torch.Tensor]:
    """Return a grid over the picture: coordinates ``[rows, columns]``, and points ``[n, 2]``."""
    left, right, low, high = BOUNDS
    x, y = np.meshgrid(np.linspace(left, right, resolution), np.linspace(low, high, resolution))
    return x, y, torch.from_numpy(np.stack((x, y), -1)).flatten(0, 1)


def _values(grid: torch.Tensor) -> list[Array]:
    """Return both losses on a grid of :func:`_grid`."""
    side = math.isqrt(len(grid))
    return [torch.vmap(loss)(grid).view(side, side).numpy() for loss in LOSSES]


def _paths(axes: Axes, name: str, paths: Array, rank: int) -> Line2D:
    """Draw the paths ``[steps, starts, 2]`` of one rule, and return its entry in a legend."""
    line = LINES[rank]
    look: dict[str, Any] = {"color": line.color, "linestyle": line.linestyle, "linewidth": 1.6}
    # Smaller from one to the next: ends in one place are all seen.
    end: dict[str, Any] = {
        "color": line.color,
        "marker": line.marker,
        "ms": 8 - 3.5 * rank,
        "mec": "white",
    }
    halo = [withStroke(linewidth=3.2, foreground="white", alpha=0.8)]
    for path in paths.swapaxes(0, 1):
        axes.plot(*path.T, **look, zorder=3, path_effects=halo)
        axes.plot(*path[-1], **end, mew=0.7, zorder=4)
        axes.plot(*path[0], "o", color="white", mec=palette.BLACK, mew=0.9, ms=4.5, zorder=5)
    return Line2D([], [], label=name, **{**look, **end})


def _point(axes: Axes, name: str, marker: str) -> Line2D:
    """Mark a minimum, and return its entry in a legend."""
    look: dict[str, Any] = {"color": palette.ORANGE, "marker": marker, "mec": palette.BLACK}
    size = 11 if marker == "*" else 7.5
    axes.plot(*POINTS[name], **look, ms=1.6 * size, mew=0.8, linestyle="", zorder=2.5)
    return Line2D([], [], label=name, **look, ms=size, mew=0.8, linestyle="")


def draw_ends(results: Results, folder: Path) -> Picture:
    """Draw all starts, coloured by where they end."""
    x, y, grid = _grid(121)
    pooled = sum(_values(grid)) / 2
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
                if place in POINTS:
                    axes.plot(*POINTS[place], marker, color=colour, mec="white", ms=13)
            axes.set(
                aspect="equal",
                title=NAMES[rule],
                xlabel=r"$\theta_1$",
                xlim=BOUNDS[:2],
                ylim=BOUNDS[2:],
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
    """Draw level sets of pairs of quadratics and of their means."""
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    with style():
        panels = list(figure.subplots(1, len(PAIRS), sharex=True, sharey=True))
        for axes, (name, hessians) in zip(panels, PAIRS.items(), strict=True):
            _ellipses(axes, torch.tensor(hessians, dtype=torch.float64))
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


def _ellipses(axes: Axes, hessians: torch.Tensor) -> None:
    """Draw where quadratic losses with these Hessians, and those with their means, are 1."""
    means = am.metrics.hessian_means(hessians)
    for matrix, face, edge, hatch, name in (
        (means.geometric, "#BFE3D6", palette.GREEN, None, "geometric mean (AND)"),
        (means.arithmetic, "#D9D9D9", palette.BLACK, "////", "arithmetic mean (OR)"),
    ):
        axes.fill(
            *_outline(matrix),
            facecolor=face,
            edgecolor=edge,
            hatch=hatch,
            hatch_linewidth=0.4,
            linewidth=1.2,
            label=name,
        )
    for name, matrix, color, line in zip(
        "AB", hessians, (palette.BLUE, palette.VERMILION), ("-", (0, (6, 2))), strict=True
    ):
        label = f"environment {name}"
        axes.plot(*_outline(matrix), color=color, linestyle=line, linewidth=1.9, label=label)
    axes.plot(0, 0, "+", color=palette.BLACK, markersize=6, label="_minimum")
    axes.set(xlabel=r"$\theta_1$", ylabel=r"$\theta_2$", aspect="equal")


def _outline(hessian: Any) -> Array:
    """Return the points ``[2, n]`` at which half of ``x H x`` is 1."""
    angle = torch.linspace(0, 2 * math.pi, 361, dtype=torch.float64)
    factor = torch.linalg.cholesky(hessian).mT
    circle = math.sqrt(2) * torch.stack((angle.cos(), angle.sin()))
    outline: Array = torch.linalg.solve_triangular(factor, circle, upper=True).numpy()
    return outline


def draw_patchwork(results: Results, folder: Path) -> Picture:
    """Draw the staircase, the network at three points, and the score over the search's length."""
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
