"""Losses on a grid, and how they are coloured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
from matplotlib.contour import QuadContourSet
from matplotlib.ticker import Formatter
from torch import Tensor

from . import palette
from ._descent import Loss, evaluate
from .style import SMALL, Array

Bounds = tuple[float, float, float, float]

_LEVELS = 13
# Light enough for lines on top; low is dark, in colour and in grey.
_SURFACE = LinearSegmentedColormap.from_list(
    "surface", ["#5F7391", "#94A2B5", "#C3C7C4", "#E4DDBC", "#FBF3D0"]
)


def lines_of(bounds: Bounds, resolution: int) -> tuple[Tensor, Tensor]:
    """Return the first and the second parameter of a grid's columns and rows."""
    if resolution < 2:
        raise ValueError(f"resolution: expected at least 2, but got {resolution}")
    if len(bounds) != 4 or not all(map(math.isfinite, bounds)):
        raise ValueError(f"bounds: expected 4 finite numbers, but got {bounds}")
    left, right, low, high = bounds
    if not (left < right and low < high):
        raise ValueError(f"bounds: expected lowest before highest, but got {bounds}")
    return (
        torch.linspace(left, right, resolution, dtype=torch.float64),
        torch.linspace(low, high, resolution, dtype=torch.float64),
    )


def surfaces_of(
    losses: Sequence[Loss], names: Sequence[str], means: Sequence[str], x: Tensor, y: Tensor
) -> list[Array]:
    """Return the losses, and their means, at the points of a grid; rows are second parameters."""
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    points = torch.stack((columns, rows), -1).flatten(0, 1)
    with torch.no_grad():
        values = torch.stack([evaluate(loss, points).double() for loss in losses])
    values = values.view(len(losses), *rows.shape).cpu()
    for name, surface in zip(names, values, strict=True):
        if "geometric" in means and (surface < 0).any():
            lowest = surface.nan_to_num(nan=math.inf).min()
            raise ValueError(
                "losses: expected no negative ones for the geometric mean, but that of environment "
                f'{name} falls to {lowest:.3g}; pass means=("arithmetic",)'
            )
    of = {"arithmetic": values.mean(0), "geometric": values.log().mean(0).exp()}
    found: list[Array] = [*values.numpy(), *(of[mean].numpy() for mean in means)]
    return found


def levels_of(surfaces: Sequence[Array]) -> Array:
    """Return levels that lie closer at low losses, up to what nine of ten values are below."""
    values = np.concatenate([surface[np.isfinite(surface)] for surface in surfaces])
    low = values.min(initial=math.inf)
    high = np.quantile(values, 0.9) if len(values) else 1.0
    low = min(low, high)
    if not high - low > 1e-9 * max(abs(low), abs(high)):  # constant
        high = low + max(abs(low), 1.0)
    levels: Array = low + (high - low) * np.linspace(0, 1, _LEVELS) ** 2
    return levels


def draw_surface(
    axes: Axes, x: Tensor, y: Tensor, surface: Array, levels: Array | None
) -> QuadContourSet | None:
    """Fill between levels (its own, unless given) and draw them; None if no value is finite."""
    levels = levels_of([surface]) if levels is None else levels
    shown = np.ma.masked_invalid(surface)
    x, y = x.cpu(), y.cpu()
    if shown.mask.all():
        axes.text(
            0.5,
            0.5,
            "not finite",
            transform=axes.transAxes,
            ha="center",
            fontsize=SMALL,
            color=palette.VERMILION,
        )
        return None
    axes.set_facecolor("#BBBBBB")
    norm = BoundaryNorm(levels, _SURFACE.N, extend="max")
    filled = axes.contourf(x, y, shown, levels, cmap=_SURFACE, norm=norm, extend="max")
    inside = levels[(levels > shown.min()) & (levels < shown.max())]
    if len(inside):
        axes.contour(x, y, shown, inside, colors="white", linewidths=0.6, alpha=0.9)
    return filled


def draw_bar(panels: Sequence[Axes], filled: QuadContourSet | None, levels: Array) -> None:
    """Draw the colour bar of panels with common levels, if they share a figure."""
    figure = panels[0].figure
    if filled is None or any(axes.figure is not figure for axes in panels):
        return
    bar = figure.colorbar(filled, ax=list(panels), pad=0.01, aspect=18, shrink=0.9)
    ticks = levels[:: (_LEVELS - 1) // 4]
    bar.set_ticks(ticks.tolist(), labels=[_written(tick, levels[-1] - levels[0]) for tick in ticks])
    bar.minorticks_off()
    bar.ax.tick_params(length=0, labelsize=8)
    bar.set_label("loss")
    bar.outline.set_visible(False)


def _written(value: float, span: float) -> str:
    return "0" if abs(value) < 1e-3 * span else Formatter.fix_minus(f"{value:.2g}")
