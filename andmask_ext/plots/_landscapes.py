"""Loss landscapes of two parameters, and descent on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from torch import Tensor

from ..rules import AndMask, Mean
from . import palette
from ._descent import Loss, Rule, check_losses, descend
from ._surfaces import Bounds, draw_bar, draw_surface, levels_of, lines_of, surfaces_of
from .style import LINES, WIDTH, Array, as_array, environment_names, panels_or_new, style

__all__ = ["loss_landscapes", "trajectories"]

Point = Tensor | Sequence[float]

_COLUMNS = 4
_MARKERS = ("*", "X", "P", "D", "v", "^")
_TITLES = {"arithmetic": "arithmetic mean (OR)", "geometric": "geometric mean (AND)"}


def loss_landscapes(
    losses: Sequence[Loss],
    bounds: Bounds = (-3.0, 3.0, -3.0, 3.0),
    *,
    means: Sequence[str] = ("arithmetic", "geometric"),
    labels: Sequence[str] | None = None,
    points: Mapping[str, Point] | None = None,
    paths: Mapping[str, Tensor] | None = None,
    shared: bool = True,
    resolution: int = 141,
    ax: Sequence[Axes] | None = None,
) -> list[Axes]:
    r"""Draw the loss of every environment over two parameters, and their means.

    The arithmetic mean is what pooled training sees: low where losses are low on average. The
    geometric mean :math:`(\prod_e L_e)^{1/d}` stands for the logical AND: near a common minimum it
    is steep only in directions in which *all* losses are. Its level depends on where losses have
    their zero.

    Args:
        losses: one for each environment, from a tensor [2] to a 0-dim one.
        bounds: lowest and highest first parameter, lowest and highest second parameter.
        means: which means to draw after the environments: "arithmetic", "geometric", both or none.
        labels: names of the environments; A, B, ... by default.
        points: places to mark in every panel, by name.
        paths: paths to draw in every panel, by name, such as :func:`descend` returns them.
        shared: draw all panels with the same levels, and one colour bar; otherwise each with its
            own, and without.
        resolution: points along each side at which losses are computed.
        ax: as many axes as panels, where to draw.

    Returns:
        The axes: one for each environment, then one for each mean. Levels lie closer at low losses;
        the highest tenth of values has one colour.

    Raises:
        TypeError: ``losses`` are not functions.
        ValueError: bounds are empty, a mean is unknown, a loss is negative where the geometric mean
            is asked for, or an argument has another length or shape.

    Shape:
        - points: :math:`(2)` each
        - paths: :math:`(*, n, 2)` each, of n descents

    Example:
        >>> from andmask_ext import plots
        >>> from andmask_ext.metrics import landscapes
        >>> example = landscapes.two_minima()
        >>> panels = plots.loss_landscapes(example.losses, example.bounds, points=example.points)
        >>> [axes.get_title() for axes in panels]
        ['environment A', 'environment B', 'arithmetic mean (OR)', 'geometric mean (AND)']

    Reference:
        Figures 1 and 3 of Parascandolo et al., *Learning explanations that are hard to vary*,
        ICLR 2021.
    """
    losses = check_losses(losses)
    names = environment_names(len(losses), labels)
    if isinstance(means, str) or not set(means) <= set(_TITLES):
        raise ValueError(
            f'means: expected a sequence of "arithmetic" and "geometric", but got {means!r}'
        )
    x, y = lines_of(bounds, resolution)
    surfaces = surfaces_of(losses, names, means, x, y)
    marked = {name: _point(name, point) for name, point in (points or {}).items()}
    drawn = {name: _path(name, path) for name, path in (paths or {}).items()}
    titles = [f"environment {name}" for name in names] + [_TITLES[mean] for mean in means]

    rows = -(-len(titles) // _COLUMNS)
    columns = -(-len(titles) // rows)
    width = WIDTH if columns > 1 else 4.5
    side = (width - (1.2 if shared else 0.5)) / columns - 0.12
    side *= (bounds[3] - bounds[2]) / (bounds[1] - bounds[0])
    size = (width, rows * (min(max(side, 0.8), 6.0) + 0.3) + (0.75 if points or paths else 0.4))
    with style():
        panels = panels_or_new(ax, len(titles), rows, size, sharex=True, sharey=True)
        common = levels_of(surfaces) if shared else None
        for axes, title, surface in zip(panels, titles, surfaces, strict=True):
            filled = draw_surface(axes, x, y, surface, common)
            for rank, path in enumerate(drawn.values()):
                _draw_paths(axes, path, rank)
            for rank, point in enumerate(marked.values()):
                axes.plot(*point, **_marked(rank, beneath=bool(drawn)))
            axes.set(xlim=bounds[:2], ylim=bounds[2:], title=title, aspect="equal")
            axes.set(xlabel=r"$\theta_1$", ylabel=r"$\theta_2$")
            axes.xaxis.labelpad = axes.yaxis.labelpad = 1
            axes.spines[:].set_visible(True)
            if ax is None:
                axes.label_outer()
        if common is not None:
            draw_bar(panels, filled, common)
        _draw_legend(panels, list(drawn), list(marked), own=ax is None)
    return panels


def trajectories(
    losses: Sequence[Loss],
    starts: Tensor,
    *,
    tau: float = 1.0,
    lr: float = 0.05,
    steps: int = 400,
    bounds: Bounds = (-3.0, 3.0, -3.0, 3.0),
    labels: Sequence[str] | None = None,
    points: Mapping[str, Point] | None = None,
    ax: Sequence[Axes] | None = None,
) -> list[Axes]:
    """Draw where the mean gradient and where the AND-mask lead, from the same starts.

    The same paths lie on the loss of every environment and on their arithmetic mean, so that one
    sees on whose slopes a step goes down. White circles are starts. For the points themselves, or
    other rules, use :func:`descend`, and draw with the ``paths`` of :func:`loss_landscapes`.

    Args:
        losses: one for each environment, from a tensor [2] to a 0-dim one.
        starts: where to begin.
        tau: agreement threshold of the AND-mask, in [0, 1].
        lr: step size, of both.
        steps: how many, of both.
        bounds: lowest and highest first parameter, lowest and highest second parameter.
        labels: names of the environments; A, B, ... by default.
        points: places to mark in every panel, by name.
        ax: as many axes as environments, and one more.

    Returns:
        The axes: one for each environment, and one for the arithmetic mean.

    Raises:
        TypeError: ``losses`` are not functions, or ``starts`` not a floating-point tensor.
        ValueError: bounds are empty, or an argument has another length or shape.

    Shape:
        - starts: :math:`(n, 2)`

    Example:
        >>> import torch
        >>> from andmask_ext import plots
        >>> from andmask_ext.metrics import landscapes
        >>> example = landscapes.two_minima()
        >>> starts = torch.tensor([[2.6, -0.8], [-2.0, -1.0]])
        >>> panels = plots.trajectories(example.losses, starts, points=example.points)
        >>> len(panels)
        3
    """
    rules: dict[str, Rule] = {f"AND-mask, τ = {tau:g}": AndMask(tau), "mean gradient": Mean()}
    paths = {name: descend(losses, starts, rule, lr, steps) for name, rule in rules.items()}
    return loss_landscapes(
        losses, bounds, means=("arithmetic",), labels=labels, points=points, paths=paths, ax=ax
    )


# ---- helpers ----


def _point(name: str, point: Point) -> Array:
    values = as_array(name, point, 1) if isinstance(point, Tensor) else np.asarray(point, float)
    if values.shape != (2,):
        raise ValueError(f"points: expected 2 numbers for {name!r}, but got {point!r}")
    return values


def _path(name: str, path: Tensor) -> Array:
    values = as_array(f"paths: {name!r}", path, 3)
    if values.shape[2] != 2 or not len(values):
        raise ValueError(
            f"paths: expected shape [steps + 1, n, 2] for {name!r}, but got {list(values.shape)}"
        )
    return values


def _draw_paths(axes: Axes, path: Array, rank: int) -> None:
    halo = [withStroke(linewidth=3.2, foreground="white", alpha=0.8)]
    for number in range(path.shape[1]):  # every start has its line
        one = path[np.isfinite(path[:, number]).all(1), number]
        if not len(one):
            continue
        axes.plot(*one.T, **_lined(rank), zorder=3, path_effects=halo)
        axes.plot(*one[-1], **_ended(rank), zorder=4)
        axes.plot(*one[0], "o", color="white", mec=palette.BLACK, mew=0.9, ms=4.5, zorder=5)


def _lined(rank: int) -> dict[str, Any]:
    line = LINES[rank % len(LINES)]
    return {"color": line.color, "linestyle": line.linestyle, "linewidth": 1.6}


def _ended(rank: int) -> dict[str, Any]:
    line = LINES[rank % len(LINES)]
    size = max(8.0 - 3.5 * rank, 3.0)  # smaller from one to the next: all in one place are seen
    return {"color": line.color, "marker": line.marker, "ms": size, "mec": "white", "mew": 0.7}


def _marked(rank: int, beneath: bool) -> dict[str, Any]:
    marker = _MARKERS[rank % len(_MARKERS)]
    size = (11 if marker == "*" else 7.5) * (1.6 if beneath else 1)  # ends lie on top
    return {
        "color": palette.ORANGE,
        "marker": marker,
        "ms": size,
        "mec": palette.BLACK,
        "mew": 0.8,
        "linestyle": "",
        "zorder": 2.5,
    }


def _draw_legend(panels: list[Axes], paths: list[str], points: list[str], own: bool) -> None:
    handles = [
        Line2D([], [], label=name, **{**_lined(rank), **_ended(rank)})
        for rank, name in enumerate(paths)
    ] + [
        Line2D([], [], label=name, **_marked(rank, beneath=False))
        for rank, name in enumerate(points)
    ]
    if not handles:
        return
    if own:
        panels[0].figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    else:
        panels[-1].legend(handles=handles, loc="upper right", frameon=True, framealpha=0.85)
