"""The report on how each parameter was treated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ._accumulator import Treatment


@dataclass(frozen=True)
class ParameterReport:
    """The name, the shape, the number of uses and the path of one parameter."""

    name: str
    shape: tuple[int, ...]
    uses: int
    path: str


class Report(tuple[ParameterReport, ...]):
    """One :class:`ParameterReport` per parameter. ``print`` shows it as a table."""

    def __str__(self) -> str:
        rows = [("parameter", "shape", "uses", "path")]
        rows += [(line.name, str(line.shape), str(line.uses), line.path) for line in self]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        )


def make_report(params: Sequence[tuple[str, Tensor]], records: Mapping[int, Treatment]) -> Report:
    """Return the report on named parameters. ``records`` are by the parameter's number."""
    lines = []
    for number, (name, param) in enumerate(params):
        record = records.get(number)
        path = "no gradient" if record is None else "; ".join(record.paths)
        lines.append(
            ParameterReport(name, tuple(param.shape), 0 if record is None else record.uses, path)
        )
    return Report(lines)
