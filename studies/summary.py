"""What a study found, for people: claims, tables, figures; printed, and kept as JSON.

A study's records hold all numbers of each run. Its summary says what they come to, and is what
``python -m studies report`` puts on a page.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .records import without_nan, write_atomically

Cell = str | int | float | None
SUFFIX = ".summary.json"


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, or about it, that runs can contradict.

    Example:
        >>> print(Claim("plain training memorises", True, "100 % train, 51.2 % test"))
        [holds] plain training memorises: 100 % train, 51.2 % test
    """

    text: str
    holds: bool
    measured: str

    def __str__(self) -> str:
        return f"[{'holds' if self.holds else 'does not hold'}] {self.text}: {self.measured}"


@dataclass(frozen=True)
class Table:
    """Rows of numbers and words; a number is printed with up to four digits, None as a dash.

    Example:
        >>> print(Table("accuracy", ("method", "test %"), [("mean", 51.25), ("and-mask", 100.0)]))
        accuracy
        method    test %
        ----------------
        mean       51.25
        and-mask     100
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"rows: expected {len(self.columns)} cells, got {row!r}")

    def __str__(self) -> str:
        cells = [list(self.columns), *([shown(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        first, *rest = (
            "  ".join(
                cell.rjust(width) if number else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        )
        return "\n".join([self.title, first, "-" * (sum(widths) + 2 * len(widths) - 2), *rest])


@dataclass(frozen=True)
class Picture:
    """A figure of a study, with a caption that says what to see in it."""

    path: Path
    caption: str


@dataclass
class Summary:
    """What a study found; notes are what a reader must know, such as what did not work."""

    claims: list[Claim] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [*map(str, self.tables), "\n".join(map(str, self.claims)), *self.notes]
        parts += [f"figure  {picture.path}" for picture in self.pictures]
        return "\n\n".join(part for part in parts if part)

    def write(self, folder: Path, name: str, facts: dict[str, Any]) -> Path:
        """Write it as JSON, together with facts such as the command line, and return the file."""
        content = facts | without_nan(
            {
                "claims": [asdict(claim) for claim in self.claims],
                "tables": [asdict(table) for table in self.tables],
                "pictures": [
                    {"file": picture.path.name, "caption": picture.caption}
                    for picture in self.pictures
                ],
                "notes": self.notes,
            }
        )
        text = json.dumps(content, indent=1, allow_nan=False, default=str)
        path = Path(folder) / f"{name}{SUFFIX}"
        write_atomically(path, lambda file: file.write(text.encode() + b"\n"))
        return path


def shown(cell: Cell) -> str:
    """Write a table's cell for people.

    Example:
        >>> shown(3.14159), shown(1234567), shown(None)
        ('3.142', '1234567', '-')
    """
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Write mean and standard deviation over seeds, with so many digits behind the point.

    Example:
        >>> spread([1.0, 2.0, 3.0])
        '2.00 ± 1.00'
    """
    values = list(values)
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1 or not all(map(math.isfinite, values)):
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"
