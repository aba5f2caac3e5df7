"""What finished runs come to: claims, tables and figures of each part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..label_noise.training import NoiseSettings
from ..spirals import Settings as SpiralsSettings
from ..study import Finished, Settings
from ..summary import Claim, Picture, Summary, Table, spread
from . import figures
from .criteria import CriterionSettings
from .settings import DEFAULT_RATE, ENVIRONMENTS, Threshold, name

Done: TypeAlias = Sequence[Finished[Settings]]

FOUND = 0.99  # test accuracy from which on a run has found the spirals
LEARNED = 0.95  # test accuracy that is good for digits
REPEATED = 0.15  # share of wrong labels, at most, that still counts as not memorised
FEWEST = 32  # environments that a rate of 0.005 ought to do with
WINDOW = 3  # epochs of which the end is the mean


def present(done: Done, folder: Path, start: str, quick: bool) -> Summary:
    """Say what the runs come to, and draw it; ``start`` begins the names of figures."""
    summary = Summary(
        notes=[
            "Spirals: the paper's data and network with standardised mechanism dimensions (as in "
            "its code); 'short' has half the examples and width and 400 steps, 'narrow' half the "
            "width. Digits: scikit-learn's in place of CIFAR-10, a quarter of the labels wrong, "
            "every example an environment."
        ]
    )
    if quick:
        summary.notes.append("The short version has one revolution, few images and one seed.")
    spirals = [one for one in done if isinstance(one.run.settings, SpiralsSettings)]
    fixed = [one for one in spirals if _spirals(one).environments == ENVIRONMENTS]
    if any(one.run.label.startswith("spirals") for one in fixed):
        _present_spirals(fixed, folder / f"{start}-spirals.png", summary)
    if len({_spirals(one).environments for one in spirals}) > 1:
        _present_environments(spirals, folder / f"{start}-environments.png", summary)
    digits = [one for one in done if isinstance(one.run.settings, NoiseSettings)]
    if digits:
        _present_digits(digits, folder / f"{start}-digits.png", summary)
    if any(isinstance(one.run.settings, CriterionSettings) for one in done):
        _present_criteria(done, folder / f"{start}-criteria.png", summary)
    return summary


def _spirals(one: Finished[Settings]) -> SpiralsSettings:
    assert isinstance(one.run.settings, SpiralsSettings)
    return one.run.settings


def _size(one: Finished[Settings]) -> str:
    return one.run.label.split()[1]


def _digits(one: Finished[Settings]) -> NoiseSettings:
    assert isinstance(one.run.settings, NoiseSettings)
    return one.run.settings


def grouped(done: Iterable[Finished[Settings]], key: Callable[..., Any]) -> dict[Any, Done]:
    """Return the runs of each key, in the order of first appearance."""
    groups: dict[Any, list[Finished[Settings]]] = {}
    for one in done:
        groups.setdefault(key(one), []).append(one)
    return dict(groups)


def accuracies(done: Done, which: str = "test") -> list[float]:
    """Return the final accuracy of each run of the spirals."""
    return [one.record["final"][f"{which}_accuracy"] for one in done]


def ends(done: Done, which: str) -> list[float]:
    """Return the mean of the last epochs of each run on digits."""
    return [float(np.mean(one.record["history"][which][-WINDOW:])) for one in done]


def _end(done: Done, which: str) -> str | None:
    return percent(ends(done, which)) if done else None


def _best(
    groups: Mapping[tuple[str, int], Done], method: str, batches: Sequence[int]
) -> list[str | None]:
    return [
        percent(max(one.record["history"]["test"]) for one in groups[method, batch])
        if (method, batch) in groups
        else None
        for batch in batches
    ]


def percent(values: Iterable[float]) -> str:
    """Write shares as per cent: mean, and deviation over seeds."""
    return spread([100 * value for value in values], 1)


def _threshold(settings: SpiralsSettings) -> str:
    words = [name(settings.threshold)]
    if settings.method != "and-mask":
        words.append(settings.method)
    if not settings.rescale:
        words.append("no rescale")
    return ", ".join(words)


def _present_spirals(done: Done, picture: Path, summary: Summary) -> None:
    groups = grouped(
        done, lambda one: (_size(one), _spirals(one).revolutions, _threshold(_spirals(one)))
    )
    places = list(dict.fromkeys((size, turns) for size, turns, _ in groups))
    methods = list(dict.fromkeys(method for *_, method in groups))
    rows = []
    for method in methods:
        cells = [groups.get((*place, method), []) for place in places]
        rows.append((method, *(_with_training(cell) for cell in cells)))
    columns = ("threshold", *(f"{size}, {turns:g} rev." for size, turns in places))
    summary.tables.append(
        Table("spirals: test accuracy, % (training accuracy in brackets)", columns, rows)
    )
    summary.claims += spirals_claims(groups)
    summary.pictures.append(
        Picture(
            figures.draw_spirals(groups, places, methods, picture),
            "Spirals: final accuracy on test data (dots: seeds; bars: means) and on training data "
            "(lines across). Dotted: guessing.",
        )
    )


def _with_training(done: Done) -> str | None:
    if not done:
        return None
    return f"{percent(accuracies(done))} ({100 * np.mean(accuracies(done, 'train')):.0f})"


def spirals_claims(groups: Mapping[tuple[str, float, str], Done]) -> list[Claim]:
    """Is there one setting for all revolutions, in all seeds?"""
    claims = []
    for size in dict.fromkeys(size for size, *_ in groups):
        turns = {turn for which, turn, _ in groups if which == size}
        worst: dict[str, float] = {}
        for which, _, method in groups:
            cells = [groups[key] for key in groups if key[0] == size and key[2] == method]
            if which == size and len(cells) == len(turns):
                worst[method] = min(min(accuracies(cell)) for cell in cells)
        for kind, text in (("fdr", "some false discovery rate"), ("tau", "no tau")):
            # Rules by their default alone: variants have more words.
            own = {m: least for m, least in worst.items() if m.startswith(kind) and "," not in m}
            if not own:
                continue
            passing = [method for method, least in own.items() if least >= FOUND]
            claims.append(
                Claim(
                    f"{size}: {text} reaches 99 % on test data with each seed, revolutions: "
                    + " ".join(f"{turn:g}" for turn in sorted(turns)),
                    bool(passing) == (kind == "fdr"),
                    "worst run of each: "
                    + ", ".join(f"{m} {100 * least:.1f} %" for m, least in own.items()),
                )
            )
    return claims


def _present_environments(done: Done, picture: Path, summary: Summary) -> None:
    least = min({_size(one) for one in done if "environments=" in one.run.label})
    own = [
        one
        for one in done
        if _size(one) == least
        and _spirals(one).revolutions == 1
        and (_spirals(one).method, _spirals(one).rescale) == ("and-mask", True)
    ]
    groups: dict[tuple[str, int], Done] = grouped(
        own, lambda one: (_threshold(_spirals(one)), _spirals(one).environments)
    )
    rate = name({"fdr": DEFAULT_RATE})
    numbers = {number for method, number in groups if method == rate}
    methods = [
        method
        for method in dict.fromkeys(method for method, _ in groups)
        if all((method, number) in groups for number in numbers)
    ]
    ordered = sorted(numbers)
    summary.tables.append(
        Table(
            "spirals with one revolution over the number of environments: test accuracy, % "
            "(training accuracy in brackets)",
            ("threshold", *map(str, ordered)),
            [(m, *(_with_training(groups[m, number]) for number in ordered)) for m in methods],
        )
    )
    means = {n: float(np.mean(accuracies(groups[rate, n]))) for n in ordered}
    summary.claims.append(
        Claim(
            f"from {FEWEST} environments on, {rate} finds the spirals with one revolution",
            all(mean >= FOUND for n, mean in means.items() if n >= FEWEST),
            ", ".join(f"{n}: {100 * mean:.1f} %" for n, mean in means.items()),
        )
    )
    summary.pictures.append(
        Picture(
            figures.draw_environments(
                {m: {n: groups[m, n] for n in ordered} for m in methods}, picture
            ),
            "Accuracy on test data (solid) and training data (dashed) over the number of "
            "environments; dots are seeds.",
        )
    )


def _method(settings: NoiseSettings) -> str:
    if settings.threshold:
        zeros: Threshold = {} if settings.zeros == "count" else {"zeros": settings.zeros}
        return name({**settings.threshold, **zeros})
    if settings.smoothing:
        return f"Adam, label smoothing {settings.smoothing:g}"
    return f"Adam, lr {settings.lr:g}"


def _present_digits(done: Done, picture: Path, summary: Summary) -> None:
    groups = grouped(done, lambda one: (_method(_digits(one)), _digits(one).batch))
    batches = sorted({batch for _, batch in groups})
    methods = list(dict.fromkeys(method for method, _ in groups))
    for which, title in (("mislabeled", "wrong labels repeated"), ("test", "test accuracy")):
        rows: list[tuple[str | None, ...]] = [
            (
                method,
                *(_end(groups.get((method, batch), []), which) for batch in batches),
            )
            for method in methods
        ]
        plain = next((m for m in methods if m.startswith("Adam, lr")), None)
        if which == "test" and plain is not None:
            rows.append((f"{plain}, stopped at its best", *(_best(groups, plain, batches))))
        columns = ("method", *(f"batch {batch}" for batch in batches))
        summary.tables.append(Table(f"digits with wrong labels: {title}, %", columns, rows))
    summary.claims += digits_claims(groups, batches)
    table = {
        method: {batch: groups[method, batch] for batch in batches if (method, batch) in groups}
        for method in methods
    }
    summary.pictures.append(
        Picture(
            figures.draw_digits(table, picture),
            "Digits with a quarter of wrong labels, over the size of the batch, in which every "
            "example is an environment. Left: wrong labels that the network repeats. Right: "
            "accuracy on test images. Means of the last three epochs; dots are seeds.",
        )
    )


def digits_claims(groups: Mapping[tuple[str, int], Done], batches: Sequence[int]) -> list[Claim]:
    """Which thresholds learn and do not memorise, and which depend on the batch the least?"""
    claims, ranges = [], {}
    for method in dict.fromkeys(method for method, _ in groups):
        cells = [groups[method, batch] for batch in batches if (method, batch) in groups]
        if len(cells) < len(batches) or method.startswith("Adam"):
            continue
        test = [float(np.mean(ends(cell, "test"))) for cell in cells]
        wrong = [float(np.mean(ends(cell, "mislabeled"))) for cell in cells]
        ranges[method] = max(test) - min(test)
        claims.append(
            Claim(
                f"digits, {method}: at least 95 % on test images and at most 15 % of the wrong "
                "labels repeated, with every batch",
                min(test) >= LEARNED and max(wrong) <= REPEATED,
                "; ".join(
                    f"batch {batch}: {100 * right:.1f} %, {100 * repeated:.1f} %"
                    for batch, right, repeated in zip(batches, test, wrong, strict=True)
                ),
            )
        )
    by_kind = {
        kind: min((value for m, value in ranges.items() if m.startswith(kind)), default=math.nan)
        for kind in ("tau", "significance", "fdr")
    }
    if all(map(math.isfinite, by_kind.values())):
        claims.append(
            Claim(
                "digits: some significance or false discovery rate depends less on the batch than "
                "every tau",
                min(by_kind["significance"], by_kind["fdr"]) < by_kind["tau"],
                "range of the test accuracy over batches: "
                + ", ".join(f"{m} {100 * value:.1f} points" for m, value in ranges.items()),
            )
        )
    return claims


def _present_criteria(done: Done, picture: Path, summary: Summary) -> None:
    points: dict[str, dict[str, Done]] = {}
    sizes = {
        _size(one)
        for one in done
        if isinstance(one.run.settings, CriterionSettings) and one.run.label.startswith("spirals")
    }
    for one in done:
        settings = one.run.settings
        method = (
            ""
            if not isinstance(settings, CriterionSettings)
            else (f"{settings.criterion} {settings.level:g}")
        )
        task = settings.task if isinstance(settings, CriterionSettings) else settings
        if isinstance(task, SpiralsSettings):
            hard = max(_turns(other) for other in done)
            if _size(one) not in sizes or task.revolutions != hard:
                continue
            place, method = "spirals", method or _threshold(task)
        else:
            assert isinstance(task, NoiseSettings)
            batches = {_batch(other) for other in done if _is_criterion_on_digits(other)}
            if task.batch not in batches:
                continue
            place, method = "digits", method or _method(task)
        cell = points.setdefault(method, {})
        cell[place] = [*cell.get(place, []), one]
    both = {method: cell for method, cell in points.items() if len(cell) == 2}
    rows = [
        (
            method,
            _with_training(cell["spirals"]),
            percent(ends(cell["digits"], "test")),
            percent(ends(cell["digits"], "mislabeled")),
        )
        for method, cell in both.items()
    ]
    summary.tables.append(
        Table(
            "one criterion for both tasks?",
            ("criterion", "spirals: test %", "digits: test %", "digits: wrong repeated %"),
            rows,
        )
    )
    right = [
        method
        for method, cell in both.items()
        if min(accuracies(cell["spirals"])) >= FOUND
        and float(np.mean(ends(cell["digits"], "test"))) >= LEARNED
        and float(np.mean(ends(cell["digits"], "mislabeled"))) <= REPEATED
    ]
    summary.claims.append(
        Claim(
            "one criterion at one level serves few strong environments and many weak ones (99 % on "
            "the spirals with each seed; digits 95 %, at most 15 % of wrong labels repeated)",
            bool(right),
            ", ".join(right) or f"none of {len(both)}",
        )
    )
    summary.pictures.append(
        Picture(
            figures.draw_criteria(both, picture),
            "Each criterion on both tasks: spirals across, digits up; the mean over seeds. The "
            "shaded corner is where both are learned.",
        )
    )


def _task(one: Finished[Settings]) -> Settings:
    settings = one.run.settings
    return settings.task if isinstance(settings, CriterionSettings) else settings


def _turns(one: Finished[Settings]) -> float:
    task = _task(one)
    return task.revolutions if isinstance(task, SpiralsSettings) else 0.0


def _batch(one: Finished[Settings]) -> int:
    task = _task(one)
    return task.batch if isinstance(task, NoiseSettings) else 0


def _is_criterion_on_digits(one: Finished[Settings]) -> bool:
    return isinstance(one.run.settings, CriterionSettings) and _batch(one) > 0
