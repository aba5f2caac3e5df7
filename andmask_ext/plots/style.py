"""The look of every figure: fonts, sizes and lines. Draw your own figures under it, too.

``style()`` is a context: what is drawn inside has the fonts of this package's figures. A figure of
``WIDTH`` inches fills a README's column. ``LINES`` are the looks of curves that share axes, which
differ without colour, too; ``SMALL`` is the font size of notes and legends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from matplotlib import rc_context

from . import palette

__all__ = ["LINES", "SMALL", "WIDTH", "Line", "style"]

WIDTH: Final = 8.3  # inches: a README's column of some 830 pixels, at 100 dots an inch
SMALL: Final = 8.5  # points


class Line(NamedTuple):
    """How a curve looks that shares axes with others: ``axes.plot(x, y, **line._asdict())``."""

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
    """Apply the settings of all figures for a while: what is drawn under it keeps them.

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
