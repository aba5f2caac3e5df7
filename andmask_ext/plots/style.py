"""The look of every figure: fonts, sizes and lines. Other figures can use it too.

``style()`` is a context. Figures that are drawn inside have the fonts of this package. A figure of
``WIDTH`` inches fills the column of a README. ``LINES`` are looks of curves that share axes. They
also differ without colour. ``SMALL`` is the font size of notes and legends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from matplotlib import rc_context

from . import palette

__all__ = ["LINES", "SMALL", "WIDTH", "Line", "style"]

WIDTH: Final = 8.3  # inches: the column of a README, about 830 pixels at 100 per inch
SMALL: Final = 8.5  # points


class Line(NamedTuple):
    """The look of a curve that shares axes: ``axes.plot(x, y, **line._asdict())``."""

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
    """Return a context with the settings of all figures. Figures drawn inside keep them.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from andmask_ext.plots.style import LINES, WIDTH, style
        >>> with style():
        ...     axes = Figure(figsize=(WIDTH, 3)).subplots()
        ...     curve = axes.plot([1, 2], [1, 4], **LINES[0]._asdict())
        >>> axes.spines["top"].get_visible()
        False
    """
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
