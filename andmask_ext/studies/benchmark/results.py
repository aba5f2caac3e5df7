"""What the contests come to: tables and claims."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..summary import Cell, Claim, Summary, Table
from .contest import EVERY
from .peers import GRADIENTS, OUR_STEP, OURS, PLAIN, PLAIN_STEP

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """What one contestant took in one case: medians over runs; None where there is no figure.

    Args:
        seconds: of a step.
        ratio: to the yardstick's.
        megabytes: at the peak, over those of the process with model and batch.
        memory_ratio: to the yardstick's.
        note: why there is no figure.
    """

    seconds: float | None
    ratio: float | None
    megabytes: float | None
    memory_ratio: float | None
    note: str


class Results:
    """Records of contests, by case.

    Args:
        records: model, kind of environments, record of each run.
    """

    def __init__(self, records: Sequence[tuple[str, str, Record]]) -> None:
        self._records = records
        self.models = list(dict.fromkeys(model for model, _, _ in records))
        self.kinds = list(dict.fromkeys(kind for _, kind, _ in records))

    @property
    def records(self) -> list[Record]:
        """All of them."""
        return [record for _, _, record in self._records]

    @property
    def cases(self) -> list[tuple[str, str]]:
        """Models and kinds of environments."""
        return list(dict.fromkeys((model, kind) for model, kind, _ in self._records))

    def of(self, model: str, kind: str) -> list[Record]:
        """Return the records of a case.

        Args:
            model: its name.
            kind: of environments.
        """
        return [record for *case, record in self._records if case == [model, kind]]

    def entry(self, model: str, kind: str, name: str, what: str = "gradients") -> Entry:
        """Return what a contestant took.

        Args:
            model: its name.
            kind: of environments.
            name: of the contestant.
            what: gradients or steps.
        """
        rows = [
            row for record in self.of(model, kind) for row in record[what]
            if row["contestant"] == name
        ]  # fmt: skip
        return Entry(
            _median(row["median"] or None for row in rows),
            _median(row["ratio"] or None for row in rows),
            _median(row["megabytes"] for row in rows),
            _median(row["memory_ratio"] for row in rows),
            next((row["note"] for row in rows if row["note"]), ""),
        )

    def exact(self, model: str, kind: str) -> list[str]:
        """Return the contestants whose gradients are those of the authors' loop.

        Args:
            model: its name.
            kind: of environments.
        """
        deviations = [record["deviations"] for record in self.of(model, kind)]
        return [
            name
            for name in GRADIENTS
            if all(name in one and one[name]["exact"] for one in deviations)
        ]


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def summarise(results: Results, timed: bool) -> Summary:
    """Write tables and claims.

    Args:
        results: of all runs.
        timed: whether times and memory are worth a claim.

    Returns:
        A summary without figures.
    """
    tables = [_exactness(results)]
    tables += [_gradients(results, kind) for kind in results.kinds]
    tables += [_steps(results), _missing(results)]
    claims = [_same(results)]
    if timed:
        claims += [
            *_fastest(results),
            _within(results, "the gradient takes at most 1.3 times as long", OURS, "ratio", 1.3),
            _within(results, "a step takes at most 1.2 times as long", OUR_STEP, "ratio", 1.2),
            _within(
                results, "a step takes at most 1.15 times the memory", OUR_STEP,
                "memory_ratio", 1.15,
            ),
            *_stacks(results),
        ]  # fmt: skip
    load = [value for record in results.records for value in record["load"]]
    notes = [
        f"The machine's load was {min(load):.1f} to {max(load):.1f} while this was measured. "
        "Contestants took turns, so that ratios suffer less than times.",
    ]
    if any(row["megabytes"] for record in results.records for row in record["gradients"]):
        notes.append(
            "Memory is the peak of two steps, with one thread in a process of its own, over that "
            "of the process with model and batch, where plain training holds little but gradients "
            "and activations."
        )
    return Summary(claims=claims, tables=[t for t in tables if t.rows], notes=notes)


# ---- tables ----


def _exactness(results: Results) -> Table:
    rows: list[Sequence[Cell]] = []
    for name in GRADIENTS:
        found = [r["deviations"][name] for r in results.records if name in r["deviations"]]
        if not found:
            continue
        differences = [one["difference"] for one in found]
        known = [value for value in differences if value is not None]
        rows.append(
            (
                name,
                len(found),
                sum(one["masked_otherwise"] for one in found),
                max(known) if len(known) == len(differences) else None,
                100 * min(one["decided"] for one in found),
            )
        )
    columns = (
        "way", "cases", "masked otherwise", "largest difference", "% decided beyond rounding",
    )  # fmt: skip
    return Table("gradients beside those of the authors' loop", columns, rows)


def _gradients(results: Results, kind: str) -> Table:
    weighed = any(row["megabytes"] for record in results.records for row in record["gradients"])
    models = [model for model, its in results.cases if its == kind]
    columns = ["way"]
    for model in models:
        columns += [f"{model}: time", f"{model}: memory"] if weighed else [model]
    rows: list[Sequence[Cell]] = []
    for name in GRADIENTS:
        row: list[Cell] = [name]
        for model in models:
            entry = results.entry(model, kind, name)
            row += [shown(entry.ratio), shown(entry.memory_ratio)][: 1 + weighed]
        rows.append(row)
    return Table(f"the gradient ÷ plain, {in_words(kind)}", columns, rows)


def in_words(kind: str) -> str:
    """Say what is an environment.

    Args:
        kind: of environments.

    Example:
        >>> in_words("8 groups")
        '8 groups, each an environment'
    """
    return f"{kind} is an environment" if kind == EVERY else f"{kind}, each an environment"


def shown(value: float | None) -> str | None:
    """Write a ratio for people.

    Args:
        value: to the yardstick's.

    Returns:
        As many digits as say something; None for None.

    Example:
        >>> shown(0.0312), shown(1.056), shown(311.4), shown(None)
        ('0.03', '1.06', '311', None)
    """
    if value is None:
        return None
    return f"{value:.0f}" if value >= 20 else f"{value:.2f}"


def _steps(results: Results) -> Table:
    rows: list[Sequence[Cell]] = []
    for model, kind in results.cases:
        gradient = results.entry(model, kind, PLAIN)
        step = results.entry(model, kind, PLAIN_STEP, "steps")
        ours = results.entry(model, kind, OUR_STEP, "steps")
        plain = [
            cell
            for one in (gradient, step)
            for cell in (None if one.seconds is None else 1e3 * one.seconds, one.megabytes)
        ]
        rows.append((model, kind, *plain, shown(ours.ratio), shown(ours.memory_ratio)))
    columns = (
        "model", "environments", "plain gradient, ms", "MiB", "plain step, ms", "MiB",
        "our step: time ÷ plain", "memory ÷ plain",
    )  # fmt: skip
    return Table("plain training, and a whole step of Agreement and AndMaskAdamW", columns, rows)


def _missing(results: Results) -> Table:
    """Return what cannot be done or was not, and why."""
    cases: dict[tuple[str, str], list[str]] = {}
    for name in GRADIENTS:
        for model, kind in results.cases:
            note = results.entry(model, kind, name).note
            if note:
                cases.setdefault((name, note), []).append(f"{model}, {kind}")
    rows = [(name, "; ".join(its), note) for (name, note), its in cases.items()]
    return Table("what is missing, or was timed once", ("way", "case", "why"), rows)


# ---- claims ----


def _same(results: Results) -> Claim:
    wrong = [
        f"{name} in {model}, {kind}"
        for model, kind in results.cases
        for record in results.of(model, kind)
        for name, one in record["deviations"].items()
        if not one["exact"]
    ]
    compared = sum(len(record["deviations"]) for record in results.records)
    return Claim(
        "every way has the gradient of the authors' loop, up to rounding",
        not wrong and compared > 0,
        f"{compared - len(wrong)} of {compared} gradients"
        + "".join(f"; not {one}" for one in wrong),
    )


def _fastest(results: Results) -> list[Claim]:
    claims = []
    for kind in results.kinds:
        measured, holds = [], True
        for model in (model for model, its in results.cases if its == kind):
            ours = results.entry(model, kind, OURS).ratio
            others = {
                name: ratio
                for name in results.exact(model, kind)
                if name != OURS and (ratio := results.entry(model, kind, name).ratio) is not None
            }
            if ours is None or not others:
                continue
            best = min(others, key=others.__getitem__)
            holds &= ours < others[best]
            measured.append(f"{model} {ours:.2f}, next {best} {others[best]:.2f}")
        claims.append(
            Claim(
                f"{kind}: Agreement is the fastest exact way to the gradient for every model",
                holds and bool(measured),
                "; ".join(measured),
            )
        )
    return claims


def _within(results: Results, text: str, name: str, field: str, most: float) -> Claim:
    what = "gradients" if name == OURS else "steps"
    found = {
        f"{model}, {kind}": getattr(results.entry(model, kind, name, what), field)
        for model, kind in results.cases
    }
    known = {case: value for case, value in found.items() if value is not None}
    over = [f"{case} {value:.2f}" for case, value in known.items() if value > most]
    span = f"{min(known.values()):.2f} to {max(known.values()):.2f}" if known else "not measured"
    return Claim(
        f"{text} as plain training's" if field == "ratio" else f"{text} of plain training's",
        bool(known) and not over,
        span + (f"; more in {', '.join(over)}" if over else ""),
    )


def _stacks(results: Results) -> list[Claim]:
    """Stacked gradients of single examples against one backward pass, in memory."""
    if EVERY not in results.kinds:
        return []
    holds, measured = True, []
    for model in (model for model, kind in results.cases if kind == EVERY):
        ours = results.entry(model, EVERY, OURS).megabytes
        stacks = {
            name: found
            for name in ("vmap(grad)", "Opacus", "BackPACK")
            if (found := results.entry(model, EVERY, name).megabytes) is not None
        }
        if ours is None or not stacks:
            continue
        least = min(stacks, key=stacks.__getitem__)
        holds &= ours < stacks[least]
        measured.append(f"{model} {ours:.0f} MiB, {least} {stacks[least]:.0f}")
    text = f"{EVERY}: Agreement needs less memory than gradients of single examples"
    return [Claim(text, holds and bool(measured), "; ".join(measured) or "not measured")]
