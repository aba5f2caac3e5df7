"""The report on how each parameter was treated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .._pending import PendingStep, State
from ..rules._kept import kept_by, noise_share, test_of
from ._setup import Setup


@dataclass(frozen=True)
class ParameterReport:
    """How one parameter was treated.

    Attributes:
        name: its name.
        shape: its shape.
        uses: how many nodes of the graph use it.
        path: how the gradients of its environments were computed.
        environments: the number d of environments. None, as all that follows: the moments of the
            last context are gone, or the rule has no threshold of votes.
        threshold: the least ``|votes|`` that keep a coordinate; d + 1: it is masked whole. If zeros
            abstain, the threshold of a coordinate without zeros.
        kept_fraction: the share of coordinates that are kept; NaN if there are none.
        noise_share: the estimated share of noise among them, at most 1; NaN if nothing is kept.
    """

    name: str
    shape: tuple[int, ...]
    uses: int
    path: str
    environments: int | None = None
    threshold: int | None = None
    kept_fraction: float | None = None
    noise_share: float | None = None


class Report(tuple[ParameterReport, ...]):
    """One :class:`ParameterReport` per parameter. ``print`` shows it as a table."""

    def __str__(self) -> str:
        rows: list[tuple[str, ...]]
        rows = [("parameter", "shape", "uses", "threshold", "kept", "noise", "path")]
        rows += [
            (line.name, str(line.shape), str(line.uses), *_cells(line), line.path) for line in self
        ]
        if all(line.threshold is None for line in self):
            rows = [(*row[:3], row[-1]) for row in rows]
        widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
            for row in rows
        )


def make_report(setup: Setup, pending: PendingStep) -> Report:
    """Return the report on the parameters of the last context."""
    shares = _shares(pending)
    lines = []
    for number, param in enumerate(setup.params):
        record = setup.treatments.get(number)
        path = "no gradient" if record is None else "; ".join(record.paths)
        uses = 0 if record is None else record.uses
        share = shares.get(id(param), ())
        lines.append(ParameterReport(setup.name(param), tuple(param.shape), uses, path, *share))
    return Report(lines)


def _shares(pending: PendingStep) -> dict[int, tuple[int, int, float, float]]:
    """Return the last fields of the reports on parameters whose moments are held, by their ids."""
    shares: dict[int, tuple[int, int, float, float]] = {}
    if pending.state in (State.OPEN, State.BROKEN) or not pending.reaches():
        return shares
    for params, moments, rule in pending.groups():
        test = test_of(rule)
        if test is None or moments.count == 0 or not moments._touched:
            continue
        with torch.no_grad():
            found = kept_by(test, moments)
        columns = (found.thresholds[:, -1], found.kept, noise_share(found.noise, found.kept))
        for index, threshold, kept, noise in zip(
            moments._touched, *(column.tolist() for column in columns), strict=True
        ):
            size = params[index].numel()
            fraction = kept / size if size else math.nan
            shares[id(params[index])] = (moments.count, threshold, fraction, noise)
    return shares


def _cells(line: ParameterReport) -> tuple[str, str, str]:
    if line.threshold is None:
        return "", "", ""
    threshold = f"{line.threshold}/{line.environments}"
    return threshold, _percent(line.kept_fraction), _percent(line.noise_share)


def _percent(share: float | None) -> str:
    return "" if share is None or math.isnan(share) else f"{100 * share:.3g} %"
