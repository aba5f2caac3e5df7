"""Cells of tables: what is read in them, and what they are sorted by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..summary import shown

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
LONG = 20  # rows; longer tables are folded at first
NUMBER = re.compile(
    r"[<>≤≥≈~]?\s*"
    rf"([+{MINUS}-]?(?:\d{{1,3}}(?:,\d{{3}})+|\d*)(?:\.\d*)?(?:e[+-]?\d+)?)"
    rf"(?=$|[\s%±{TIMES}(])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        text: what is read; a dash where there is nothing.
        key: what it is sorted by, where that is a number.
        path: of a curve: SVG path data.
    """

    text: str
    key: float | None = None
    path: str = ""


@dataclass(frozen=True)
class Grid:
    """A table for the page.

    Args:
        title: what it shows.
        columns: headings.
        rows: as many cells each.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @property
    def long(self) -> bool:
        """Whether it is so long that it shall stay folded at first."""
        return len(self.rows) > LONG

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers, and so stand on the right."""
        columns = [
            [row[place] for row in self.rows if row[place].text != DASH]
            for place in range(len(self.columns))
        ]
        return [
            bool(column) and all(one.key is not None and not one.path for one in column)
            for column in columns
        ]


def cell(value: Any) -> Cell:
    """Write a value that JSON can hold.

    Args:
        value: long lists are counted rather than written.

    Returns:
        The cell, sorted by all digits of a number, not by those that are shown.

    Example:
        >>> cell(1 / 3)
        Cell(text='0.3333', key=0.3333333333333333, path='')
        >>> cell("51.20 ± 0.94").key, cell("and-mask").key
        (51.2, None)
    """
    if value is None or value in ("", "-", DASH, []):
        return Cell(DASH)
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, list):
        plain = len(value) <= 6 and not any(isinstance(item, (list, dict)) for item in value)
        return Cell(", ".join(cell(v).text for v in value) if plain else f"{len(value)} values")
    if isinstance(value, (int, float)):
        return Cell(shown(value), value)
    return Cell(str(value), number(str(value)))


def number(text: str) -> float | None:
    """Return the number that a text begins with, if it is about a number.

    Args:
        text: such as ``51.20 ± 0.94``, ``< 1e-9``, ``1,024 MB``.

    Returns:
        The number; None of a text that only begins with one, such as ``3-layer``.

    Example:
        >>> number("51.20 ± 0.94"), number("< 1e-9"), number("1,024 MB"), number("3-layer")
        (51.2, 1e-09, 1024.0, None)
    """
    if match := NUMBER.match(text.strip()):
        try:
            return float(match[1].replace(MINUS, "-").replace(",", ""))
        except ValueError:
            pass
    return None


def duration(seconds: Any) -> Cell:
    """Write a time for people.

    Args:
        seconds: a number; anything else is a dash.

    Example:
        >>> duration(200.4)
        Cell(text='3 min 20 s', key=200.4, path='')
    """
    if not isinstance(seconds, (int, float)):
        return cell(None)
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    if hours:
        text = f"{hours} h {left} min"
    elif minutes:
        text = f"{minutes} min {rest} s"
    else:
        text = f"{rest} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    return Cell(text, seconds)


def words(name: str) -> str:
    """Write a name of code for people."""
    return name.replace("_", " ")
