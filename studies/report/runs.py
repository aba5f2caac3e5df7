"""A table of single runs: in what they differ, how they ended, how they got there."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..summary import shown
from .cells import Cell, Grid, cell, duration, words
from .collect import FoundRecord

CURVES = 4  # of a run, at most
POINTS = 60  # of a curve, at most
WIDTH, HEIGHT = 100, 24  # of a curve's picture
# A history may say when its values were taken: places, not values.
PLACES = frozenset({"epoch", "epochs", "step", "steps", "iteration", "iterations"})


@dataclass(frozen=True)
class Runs:
    """Runs of one kind.

    Args:
        grid: in what they differ, seeds, results, times, curves, names of their files.
        common: settings that all of them share, and their values.
        undrawn: names of further curves, for which there is no room.
    """

    grid: Grid
    common: Sequence[tuple[str, str]]
    undrawn: Sequence[str]


def split(records: Sequence[FoundRecord]) -> list[list[FoundRecord]]:
    """Split the records of a study that has runs of several kinds.

    Args:
        records: those of one study, in any order.

    Returns:
        Those together that share the names of most settings, for a method may have one that
        others lack; in the order of their files' names.
    """
    kinds: list[tuple[set[str], list[FoundRecord]]] = []
    for record in sorted(records, key=_natural):
        names = set(record.content["identity"].get("settings", {}))
        for known, kind in kinds:
            if 2 * len(names & known) > min(len(names), len(known)) or names == known:
                kind.append(record)
                break
        else:
            kinds.append((names, [record]))
    return [kind for _, kind in kinds]


def lay_out(title: str, records: Sequence[FoundRecord]) -> Runs:
    """Lay out records as a table.

    Args:
        title: what the table shows.
        records: at least one.

    Returns:
        The table, and what is not in it.
    """
    settings = [_settings(record.content["identity"]) for record in records]
    finals = [dict(_flat(record.content.get("final", {}))) for record in records]
    curves = [_curves(record.content.get("history", {})) for record in records]
    names = _union(settings)
    differ = [n for n in names if any(n not in s or s[n] != settings[0][n] for s in settings)]
    results, series = _union(finals), _union(curves)
    series, undrawn = series[:CURVES], series[CURVES:]
    bounds = {name: _bounds([c[name] for c in curves if name in c]) for name in series}
    rows = [
        [
            *(cell(own.get(name)) for name in differ),
            cell(record.content["identity"].get("seed")),
            *(cell(final.get(name)) for name in results),
            duration(record.content.get("seconds")),
            *(_curve(name, curve.get(name), *bounds[name]) for name in series),
            Cell(record.path.name),
        ]
        for record, own, final, curve in zip(records, settings, finals, curves, strict=True)
    ]
    columns = [*differ, "seed", *results, "time", *(f"{name}, curve" for name in series), "record"]
    common = [(words(n), cell(settings[0][n]).text) for n in names if n not in differ]
    return Runs(Grid(title, [words(column) for column in columns], rows), common, undrawn)


def _natural(record: FoundRecord) -> list[tuple[float, str]]:
    """Sort names as people do: seed2 before seed10."""
    parts = re.split(r"(\d+(?:\.\d+)?)", record.path.name)
    return [(float(part), "") if place % 2 else (0.0, part) for place, part in enumerate(parts)]


def _settings(identity: Mapping[str, Any]) -> dict[str, Any]:
    own = dict(_flat(identity.get("settings", {})))
    own |= {n: identity[n] for n in ("threads", "revision") if n in identity}
    return own | {f"{name} version": v for name, v in identity.get("versions", {}).items()}


def _flat(values: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{start}{name}.")
        else:
            yield f"{start}{name}", value


def _union(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for one in mappings for name in one))


def _curves(history: Mapping[str, Any]) -> dict[str, list[float | None]]:
    return {
        name: values
        for name, values in _flat(history)
        if name not in PLACES
        and isinstance(values, list)
        and all(value is None or type(value) in (int, float) for value in values)
        and sum(value is not None for value in values) > 1
    }


def _bounds(curves: Sequence[Sequence[float | None]]) -> tuple[float, float]:
    """Return the least and the largest value: all runs share axes, so that they compare."""
    values = [value for curve in curves for value in curve if value is not None]
    return min(values), max(values)


def _curve(name: str, values: Sequence[float | None] | None, least: float, most: float) -> Cell:
    if values is None:
        return cell(None)
    known = [value for value in values if value is not None]
    text = f"{words(name)}: {len(values)} values, {shown(known[0])} to {shown(known[-1])}"
    return Cell(text, known[-1], _path(values, least, most))


def _path(values: Sequence[float | None], least: float, most: float) -> str:
    """Draw values as SVG path data; the line breaks where a run diverged."""
    last = len(values) - 1
    points = min(POINTS, len(values))
    height = most - least
    path, pen_down = "", False
    for place in [round(point * last / (points - 1)) for point in range(points)]:
        value = values[place]
        if value is None or not math.isfinite(value):
            pen_down = False
            continue
        share = (value - least) / height if height else 0.5
        x, y = WIDTH * place / last, HEIGHT * (1 - share)
        path += f"{'L' if pen_down else 'M'}{x:.4g} {y:.3g}"
        pen_down = True
    return path
