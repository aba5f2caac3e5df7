"""What the contests come to: tables and claims."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from studies.summary import Cell, Claim, Summary, Table

from .contest import EVERY
from .peers import EXACT, GRADIENTS, OUR_STEP, OURS, PLAIN, PLAIN_STEP

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """What one contestant took in one case: medians over runs; None where there is no figure."""

    seconds: float | None
    ratio: float | None  # to the yardstick's
    megabytes: float | None  # at the peak, over those of the process with model and batch
    memory_ratio: float | None
    note: str  # why there is no figure


class Results:
    """Records of contests, by case."""

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
        """Return the records of a case."""
        return [record for *case, record in self._records if case == [model, kind]]

    def entry(self, model: str, kind: str, name: str, what: str = "gradients") -> Entry:
        """Return what a contestant took."""
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
        """Return the contestants whose gradients are those of the authors' loop."""
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
    """Write tables and claims."""
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
            "and activations. Opacus and BackPACK, which change the model that they are given, "
            "have a copy of it in theirs: the bytes of its parameters once more."
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
    """Say what is an environment."""
    return f"{kind} is an environment" if kind == EVERY else f"{kind}, each an environment"


def shown(value: float | None) -> str | None:
    """Write a ratio for people."""
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
    """All but the loop itself, and ours in every record."""
    compared, wrong = 0, []
    for model, kind in results.cases:
        for record in results.of(model, kind):
            found = {name: one for name, one in record["deviations"].items() if name != EXACT}
            compared += len(found)
            wrong += [
                f"not {name} in {model}, {kind}" for name, one in found.items() if not one["exact"]
            ]
            if OURS not in found:
                wrong.append(f"no gradient of {OURS} in {model}, {kind}")
    exact = compared - sum(one.startswith("not ") for one in wrong)
    return Claim(
        "every way has the gradient of the authors' loop, up to rounding",
        not wrong and compared > 0,
        "; ".join([f"{exact} of {compared} gradients", *wrong]),
    )


def _fastest(results: Results) -> list[Claim]:
    return [
        _first(
            results,
            kind,
            f"{kind}: Agreement is the fastest exact way to the gradient for every model",
            [name for name in GRADIENTS if name != PLAIN],
            "ratio",
            ("{:.2f}", "next {} {:.2f}"),
        )
        for kind in results.kinds
    ]


def _stacks(results: Results) -> list[Claim]:
    """Stacked gradients of single examples against one backward pass, in memory."""
    if EVERY not in results.kinds:
        return []
    text = f"{EVERY}: Agreement needs less memory than gradients of single examples"
    stacks, words = ["vmap(grad)", "Opacus", "BackPACK"], ("{:.0f} MiB", "{} {:.0f}")
    return [_first(results, EVERY, text, stacks, "megabytes", words)]


def _first(
    results: Results,
    kind: str,
    text: str,
    ways: Sequence[str],
    field: str,
    words: tuple[str, str],
) -> Claim:
    """Agreement against other exact ways, in every model; one left undecided is not won."""
    holds, measured = True, []
    for model in (model for model, its in results.cases if its == kind):
        ours = getattr(results.entry(model, kind, OURS), field)
        exact = results.exact(model, kind)
        others = {
            name: value
            for name in ways
            if name in exact
            and name != OURS
            and (value := getattr(results.entry(model, kind, name), field)) is not None
        }
        if OURS not in exact or ours is None or not others:
            holds = False
            measured.append(
                f"{model}: {OURS} has not the loop's gradient" if OURS not in exact
                else f"{model}: {OURS} not measured" if ours is None
                else f"{model} {words[0].format(ours)}, no other exact way measured"
            )  # fmt: skip
            continue
        best = min(others, key=others.__getitem__)
        holds &= ours < others[best]
        measured.append(f"{model} {words[0].format(ours)}, {words[1].format(best, others[best])}")
    return Claim(text, holds and bool(measured), "; ".join(measured))


def _within(results: Results, text: str, name: str, field: str, most: float) -> Claim:
    what = "gradients" if name == OURS else "steps"
    known, over = [], []
    for model, kind in results.cases:
        value = getattr(results.entry(model, kind, name, what), field)
        if value is not None:
            known.append(value)
        if OURS not in results.exact(model, kind):
            over.append(f"not the loop's gradient in {model}, {kind}")
        elif value is None:
            over.append(f"not measured in {model}, {kind}")
        elif value > most:
            over.append(f"more in {model}, {kind} {value:.2f}")
    return Claim(
        f"{text} as plain training's" if field == "ratio" else f"{text} of plain training's",
        bool(known) and not over,
        "; ".join([f"{min(known):.2f} to {max(known):.2f}", *over]) if known else "not measured",
    )
