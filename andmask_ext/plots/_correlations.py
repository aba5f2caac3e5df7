"""Figures of cosines between gradients, and of correlations of the update with signals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import Formatter
from torch import Tensor

from . import palette
from ._axes import DIVERGING, as_array, axes_or_new, check_has, environment_names
from ._data import Correlations
from .style import LINES, WIDTH, style

__all__ = ["gradient_correlation", "gradient_cosines"]

_WRITTEN = 12  # largest number of environments with values in the cells
_NAMED = 24  # largest number of environments with a name for each


def gradient_cosines(
    matrix: Tensor, labels: Sequence[str] | None = None, *, ax: Axes | None = None
) -> Axes:
    """Draw the cosines between the gradients of every two environments.

    Blue cells point the same way, vermilion cells point against each other, white cells are
    orthogonal, and grey cells are NaN. With up to 12 environments, the cells show the values.

    Args:
        matrix: cosines in [-1, 1], as :func:`andmask_ext.metrics.gradient_cosines` returns them.
        labels: names of the environments; default: numbers.
        ax: the axes to draw into; default: a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: ``matrix`` is not a tensor.
        ValueError: ``matrix`` is not square, or there is not one label per environment.

    Shape:
        - matrix: :math:`(d, d)`

    Example:
        >>> import torch
        >>> from andmask_ext import plots
        >>> axes = plots.gradient_cosines(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), ["A", "B"])
        >>> axes.texts[0].get_text()
        '1.00'
    """
    values = as_array("matrix", matrix, 2)
    count = len(values)
    if not count or values.shape != (count, count):
        raise ValueError(
            f"matrix: expected shape [d, d] of d >= 1 environments, but got {list(values.shape)}"
        )
    names = (
        [str(number) for number in range(count)]
        if labels is None
        else environment_names(count, labels)
    )
    with style():
        side = min(1.9 + 0.42 * count, 6.0) if count <= _WRITTEN else 5.2
        axes = axes_or_new(ax, (max(side + 1.1, 3.4), side))
        image = axes.imshow(np.ma.masked_invalid(values), cmap=DIVERGING, vmin=-1, vmax=1)
        if count <= _WRITTEN:
            for (row, column), value in np.ndenumerate(values):
                text = Formatter.fix_minus(f"{value:.2f}")
                dark = value > 0.55 or value < -0.75
                axes.text(
                    column,
                    row,
                    text,
                    ha="center",
                    va="center",
                    fontsize=9.5 if count <= 8 else 7.5,
                    color="white" if dark else palette.BLACK,
                )
        if count <= _NAMED:
            long = max(map(len, names)) > 3
            axes.set_xticks(range(count), names, rotation=45 if long else 0)
            if long:
                for tick in axes.get_xticklabels():
                    tick.set(ha="right", rotation_mode="anchor")
            axes.set_yticks(range(count), names)
            axes.tick_params(length=0)
        axes.set(xlabel="environment", ylabel="environment")
        axes.spines[:].set_visible(False)
        bar = axes.figure.colorbar(image, ax=axes, ticks=[-1, -0.5, 0, 0.5, 1], pad=0.02)
        bar.set_label("cosine of gradients")
        bar.outline.set_visible(False)
    return axes


def gradient_correlation(result: Correlations, *, ax: Axes | None = None) -> Axes:
    """Draw the correlation of the masked gradient with each signal, as a function of the threshold.

    There is a line for each signal. It has gaps where nothing is kept.

    Args:
        result: the result of :func:`andmask_ext.metrics.gradient_correlation`.
        ax: the axes to draw into; default: a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: a part of the result is not a tensor.
        ValueError: there is no signal, or lengths differ.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from andmask_ext import plots
        >>> result = SimpleNamespace(tau=torch.tensor([0.0, 1.0]), correlations={
        ...     "mechanism": torch.tensor([0.4, 0.9]), "shortcut": torch.tensor([0.8, 0.1])})
        >>> [line.get_label() for line in plots.gradient_correlation(result).lines[:2]]
        ['mechanism', 'shortcut']

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 4.1.
    """
    maker = "metrics.gradient_correlation(grads, signals)"
    check_has("result", result, ("tau", "correlations"), maker)
    tau = as_array("tau", result.tau, 1)
    signals = {name: as_array(name, values, 1) for name, values in result.correlations.items()}
    if not signals:
        raise ValueError("correlations: expected at least one signal, but got none")
    for name, values in signals.items():
        if len(values) != len(tau):
            raise ValueError(
                f"correlations: expected {len(tau)} of {name!r}, one for each tau, "
                f"but got {len(values)}"
            )
    with style():
        axes = axes_or_new(ax, (WIDTH, 3.4))
        for number, (name, values) in enumerate(signals.items()):
            axes.plot(
                tau,
                values,
                **LINES[number % len(LINES)]._asdict(),
                markersize=5,
                markevery=max(1, len(tau) // 16),
                linewidth=2,
                label=name,
            )
        axes.axhline(0, color=palette.GREY, linewidth=0.9, zorder=0, label="_zero")
        finite = np.concatenate([values[np.isfinite(values)] for values in signals.values()])
        low = min(finite.min(initial=0.0), 0.0)
        axes.set_ylim(low - 0.06 if low < 0 else -0.03, max(finite.max(initial=0.0) + 0.06, 1.03))
        axes.set(xlabel="threshold τ of the AND-mask", ylabel="correlation with masked gradient")
        axes.grid(alpha=0.25)
        axes.legend(loc="best", ncols=1 if len(signals) <= 4 else 2)
    return axes
