"""The figure of what is kept of every parameter during training."""

from __future__ import annotations

import math

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.ticker import LogLocator, StrMethodFormatter

from .._checks import check_bool
from . import palette
from ._axes import DIVERGING, Array, as_array, axes_or_new, check_has
from ._data import Records
from .style import WIDTH, style

__all__ = ["kept_fraction"]

_LETTERS = 30  # the longest name of a parameter
_ROWS = 40  # the largest number of parameters with a name for each
_LABELS = {
    "kept_fraction": "share of coordinates kept",
    "threshold": "threshold t / d",
    "noise_share": "share of noise in kept",
}


def kept_fraction(
    monitor: Records,
    metric: str = "kept_fraction",
    *,
    relative: bool = False,
    limits: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a heat map of the share of coordinates that the AND-mask keeps, by parameter and step.

    The first parameter is the top row. Long names are cut in the middle. NaN is hatched. With
    ``metric="threshold"``, vermilion is a parameter that is masked whole.

    Args:
        monitor: a :class:`andmask_ext.metrics.Monitor` with records.
        metric: what to draw: ``"kept_fraction"``, the ``"threshold"`` of votes as a share of the
            environments, or ``"noise_share"``, the estimated share of noise among what is kept.
        relative: divide shares by the share expected for noise, and use a logarithmic scale. White
            is noise, blue is more, and vermilion is less.
        limits: lowest and highest value of the colours. Default: from 0 to the highest value, or
            to 1 for the threshold; with ``relative``, as far below noise as the highest value is
            above it.
        ax: the axes to draw into; default: a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there is no record or no parameter, shapes differ, ``metric`` is unknown or is
            drawn with ``relative``, or ``limits`` do not increase.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from andmask_ext import plots
        >>> monitor = SimpleNamespace(steps=[0, 10], names=["0.weight", "0.bias"],
        ...                           series=lambda metric: torch.tensor([[0.1, 0.5], [0.2, 0.6]]))
        >>> [text.get_text() for text in plots.kept_fraction(monitor).get_yticklabels()]
        ['0.weight', '0.bias']
    """
    check_has("monitor", monitor, ("steps", "names", "series"), "a metrics.Monitor")
    check_bool("relative", relative)
    if metric not in _LABELS:
        raise ValueError(f"metric: expected one of {', '.join(_LABELS)}, but got {metric!r}")
    if relative and metric != "kept_fraction":
        raise ValueError(f"relative: expected False for {metric}, as only shares are compared")
    steps, names = np.asarray(monitor.steps, dtype=float), list(monitor.names)
    if not len(steps) or not names:
        raise ValueError(
            f"monitor: expected records of parameters, but got {len(steps)} records "
            f"of {len(names)} parameters"
        )
    values = _series(monitor, metric, (len(steps), len(names)))
    if relative:
        noise = _series(monitor, "noise_kept_fraction", (len(steps), len(names)))
        with np.errstate(divide="ignore", invalid="ignore"):
            values = values / noise
    whole = values > 1 if metric == "threshold" else np.zeros(values.shape, dtype=bool)
    default = (0.0, 1.0) if metric == "threshold" else None
    low, high = _limits(values, relative, limits or default)
    colours: Colormap = colormaps["cividis"]
    if relative:
        colours = DIVERGING.with_extremes(bad=(0, 0, 0, 0))
    if whole.any():  # they alone lie beyond the end
        values = np.where(whole, high + 1, np.minimum(values, high))
        colours = colours.with_extremes(over=palette.VERMILION)
    if relative:  # a logarithmic scale has no 0: draw it at the low end
        values = np.where(values <= 0, low, np.where(np.isposinf(values), high, values))
    with style():
        axes = axes_or_new(ax, (WIDTH, 1.3 + min(max(0.21 * len(names), 1.2), 7)))
        mesh = axes.pcolormesh(
            _edges(steps),
            np.arange(len(names) + 1) - 0.5,
            np.ma.masked_invalid(values.T),
            cmap=colours,
            norm=LogNorm(low, high) if relative else Normalize(low, high),
            rasterized=True,
        )
        # Grey alone looks like the middle of the colours.
        axes.patch.set(facecolor="white", hatch="/////", edgecolor="#777777", linewidth=0)
        axes.set_ylim(len(names) - 0.5, -0.5)
        shown = range(0, len(names), -(-len(names) // _ROWS))
        axes.set_yticks(
            list(shown), [_elided(names[i]) for i in shown], fontsize=8 if len(names) > 12 else 9
        )
        axes.tick_params(axis="y", length=0 if len(shown) == len(names) else 3)
        axes.set_xlabel("training step")
        if len(steps) == 1:
            axes.set_xticks(steps, [f"{steps[0]:.0f}"])
        axes.spines[:].set_visible(False)
        extend = "max" if whole.any() else "neither"
        bar = axes.figure.colorbar(mesh, ax=axes, pad=0.015, aspect=25, extend=extend)
        bar.outline.set_visible(False)
        if relative:
            steps_of_ten = (1, 2, 5) if high / low < 1000 else (1,)
            bar.set_ticks(LogLocator(subs=steps_of_ten))
            bar.formatter = StrMethodFormatter("{x:g}")
            bar.minorticks_off()
        label = "kept: multiple of noise" if relative else _LABELS[metric]
        bar.set_label("t / d (tip: masked whole)" if whole.any() else label)
    return axes


def _series(monitor: Records, metric: str, shape: tuple[int, int]) -> Array:
    values = as_array(metric, monitor.series(metric), 2)
    if values.shape != shape:
        raise ValueError(
            f"{metric}: expected shape [records, parameters] = {list(shape)}, "
            f"but got {list(values.shape)}"
        )
    return values


def _limits(
    values: Array, relative: bool, limits: tuple[float, float] | None
) -> tuple[float, float]:
    if limits is not None:
        low, high = limits
        if not (0 if relative else -math.inf) < low < high:
            raise ValueError(
                f"limits: expected two {'positive ' if relative else ''}rising numbers, "
                f"but got {low} and {high}"
            )
    elif relative:
        usual = values[np.isfinite(values) & (values > 0)]
        far = math.exp(np.abs(np.log(usual)).max()) if len(usual) else 1.0
        high = max(far, 2.0)
        low = 1 / high
    else:
        high = np.nanmax(values, initial=0.0, where=np.isfinite(values))
        low, high = 0.0, high if high > 0 else 1.0
    return low, high


def _edges(steps: Array) -> Array:
    """Return cell edges half-way between the steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[:-1] + steps[1:]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def _elided(name: str) -> str:
    """Cut a long name in the middle, as both ends are needed to distinguish parameters."""
    if len(name) <= _LETTERS:
        return name
    head = _LETTERS // 3
    return f"{name[:head]}…{name[head + 1 - _LETTERS :]}"
