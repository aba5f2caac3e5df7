"""What all figures share: fonts, lines, sizes, and where a figure comes from."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from . import palette

Array = np.ndarray[Any, np.dtype[Any]]

WIDTH: Final = 8.3  # inches: a README's column of some 830 pixels, at 100 dots an inch
SMALL: Final = 8.5  # points, of notes and legends

# Vermilion is conflict, blue is agreement; blue ends darker, so that the ends differ in grey, too.
DIVERGING: Final = LinearSegmentedColormap.from_list(
    "conflict", [palette.VERMILION, "#F3C9A5", "#FFFFFF", "#8DBFE0", "#00456F"]
).with_extremes(bad="#BBBBBB")


class Line(NamedTuple):
    """How a curve looks that shares axes with others."""

    color: str
    linestyle: Any
    marker: str


LINES: Final = (
    Line(palette.BLUE, "-", "o"),
    Line(palette.VERMILION, (0, (5, 2)), "s"),
    Line(palette.GREEN, (0, (1, 1.2)), "^"),
    Line(palette.BLACK, (0, (5, 1.5, 1, 1.5)), "D"),
    Line(palette.ORANGE, (0, (3, 1, 1, 1, 1, 1)), "v"),
    Line(palette.PURPLE, (0, (8, 2)), "P"),
)


@contextmanager
def style() -> Iterator[None]:
    """Apply the settings of all figures for a while: what is drawn under it keeps them."""
    with rc_context(
        {
            "font.size": 10,
            "axes.titlesize": 10.5,
            "axes.labelsize": 10,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.fontsize": SMALL,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "image.interpolation": "nearest",
        }
    ):
        yield


def axes_or_new(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return ``ax``, or the axes of a new figure of this size in inches."""
    if ax is None:
        return plt.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise TypeError(f"ax: expected matplotlib Axes, but got {type(ax).__name__}")
    return ax


def panels_or_new(
    ax: Sequence[Axes] | None, count: int, rows: int, size: tuple[float, float], **options: Any
) -> list[Axes]:
    """Return the ``count`` panels ``ax``, or those of a new figure; surplus panels are removed."""
    if ax is None:
        columns = -(-count // rows)
        figure, grid = plt.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False, **options
        )
        for spare in grid.flat[count:]:
            figure.delaxes(spare)
        return list(grid.flat[:count])
    given = list(ax.flat if isinstance(ax, np.ndarray) else ax) if np.iterable(ax) else [ax]
    if not all(isinstance(one, Axes) for one in given):
        raise TypeError("ax: expected a sequence of matplotlib Axes")
    if len(given) != count:
        raise ValueError(f"ax: expected {count} axes, one for each panel, but got {len(given)}")
    return given


def environment_names(count: int, labels: Sequence[str] | None) -> list[str]:
    """Return ``labels``, or A, B, C and so on; numbers where letters do not suffice."""
    if labels is None:
        letters = count <= len(string.ascii_uppercase)
        return list(string.ascii_uppercase[:count]) if letters else [str(i) for i in range(count)]
    if isinstance(labels, str) or len(labels) != count:
        raise ValueError(f"labels: expected {count}, one for each environment, but got {labels!r}")
    return list(labels)


def check_has(name: str, value: object, attributes: tuple[str, ...], maker: str) -> None:
    """Raise unless ``value`` is what some function of the metrics returns."""
    if not all(hasattr(value, attribute) for attribute in attributes):
        raise TypeError(f"{name}: expected {maker}, but got {type(value).__name__}")


def as_array(name: str, value: object, dims: int) -> Array:
    """Return a tensor's values as a float64 array, wherever they lie."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, but got {type(value).__name__}")
    if value.dim() != dims:
        raise ValueError(
            f"{name}: expected a tensor with {dims} dimensions, but got shape {list(value.shape)}"
        )
    array: Array = value.detach().cpu().double().numpy()
    return array


def percent(share: float) -> str:
    """Write a share for people: two digits that count, and ``<`` rather than a long fraction."""
    if share == 0 or share >= 0.9995:
        return f"{100 * share:.0f} %"
    if share < 1e-5:
        return "< .001 %"
    return f"{100 * share:.2g} %" if share < 0.0995 else f"{100 * share:.1f} %"
