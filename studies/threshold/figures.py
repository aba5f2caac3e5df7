"""The figures of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from andmask_ext.plots.palette import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION
from andmask_ext.plots.style import LINES, SMALL, style

from ..figures import save
from ..study import Finished

Done = Sequence[Finished[Any]]
COLOURS = {"fdr": BLUE, "significance": GREEN, "tau": VERMILION, "Adam": GREY}
CHANCE = 50


def colour(method: str) -> str:
    """Return the colour of what sets the threshold; purple for a criterion of the study."""
    return next((c for start, c in COLOURS.items() if method.startswith(start + "=")), PURPLE)


def _finals(done: Done, which: str) -> list[float]:
    return [100 * one.record["final"][f"{which}_accuracy"] for one in done]


def draw_spirals(
    groups: Mapping[tuple[str, float, str], Done],
    places: Sequence[tuple[str, float]],
    methods: Sequence[str],
    path: Path,
) -> Path:
    """Draw final accuracies: a panel for each size and number of revolutions, a row a method."""
    with style():
        figure = Figure(
            figsize=(2.0 + 1.35 * len(places), 1.2 + 0.24 * len(methods)), layout="constrained"
        )
        panels = figure.subplots(1, len(places), sharey=True, squeeze=False)[0]
        for axes, place in zip(panels, places, strict=True):
            axes.axvline(CHANCE, color=GREY, linewidth=1, linestyle=":", zorder=0)
            for row, method in enumerate(methods):
                if (done := groups.get((*place, method))) is None:
                    continue
                test, train = _finals(done, "test"), _finals(done, "train")
                axes.barh(row, np.mean(test) - 40, left=40, height=0.62, color="#E4E4E4")
                axes.vlines(train, row - 0.3, row + 0.3, color=BLACK, linewidth=0.8, alpha=0.6)
                axes.scatter(
                    test, [row] * len(test), s=22, color=colour(method), zorder=3, clip_on=False
                )
            size, turns = place
            axes.set(xlim=(40, 101), ylim=(len(methods) - 0.4, -0.6))
            axes.set_title(
                f"{size}\n{turns:g} revolution{'s' if turns != 1 else ''}", fontsize=SMALL
            )
            axes.set_xticks((50, 75, 100))
            axes.tick_params(axis="y", length=0)
        panels[0].set_yticks(range(len(methods)), methods, fontsize=SMALL)
        for text, method in zip(panels[0].get_yticklabels(), methods, strict=True):
            text.set_color(colour(method))
        figure.supxlabel("accuracy (%): test (dots), training (lines)", fontsize=SMALL)
        return save(figure, path)


def draw_environments(groups: Mapping[str, Mapping[int, Done]], path: Path) -> Path:
    """Draw accuracy over the number of environments."""
    with style():
        figure = Figure(figsize=(6.6, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.axhline(CHANCE, color=GREY, linewidth=1, linestyle=":", zorder=0)
        numbers = sorted({number for cells in groups.values() for number in cells})
        for method, cells in groups.items():
            own = colour(method)
            for which, dashes in (("test", "-"), ("train", (0, (4, 2)))):
                means = [np.mean(_finals(done, which)) for done in cells.values()]
                label = method if which == "test" else None
                axes.plot(list(cells), means, color=own, linestyle=dashes, label=label)
            for number, done in cells.items():
                values = _finals(done, "test")
                axes.scatter(
                    [number] * len(values), values, s=20, color=own, zorder=3, clip_on=False
                )
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.minorticks_off()
        axes.set(xlabel="training environments", ylabel="accuracy (%)", ylim=(40, 102))
        axes.legend(loc="best")
        return save(figure, path)


def draw_digits(groups: Mapping[str, Mapping[int, Done]], path: Path) -> Path:
    """Draw wrong labels repeated and test accuracy over the size of the batch."""
    with style():
        figure = Figure(figsize=(8.3, 4.2), layout="constrained")
        panels = figure.subplots(1, 2)
        looks = [*LINES] * (1 + len(groups) // len(LINES))
        batches = sorted({batch for cells in groups.values() for batch in cells})
        for axes, which in zip(panels, ("mislabeled", "test"), strict=True):
            for (method, cells), look in zip(groups.items(), looks, strict=False):
                values = {b: [_end(one, which) for one in done] for b, done in cells.items()}
                means = [np.mean(each) for each in values.values()]
                own = colour(method) if colour(method) != PURPLE else GREY
                axes.plot(
                    list(values), means, color=own, linestyle=look.linestyle, marker=look.marker,
                    markersize=5, linewidth=1.4, label=method,
                )  # fmt: skip
                for batch, each in values.items():
                    if len(each) > 1:
                        axes.plot(
                            [batch] * len(each), each, ".", color=own, alpha=0.4, markersize=4
                        )
            axes.set_xscale("log", base=2)
            axes.set_xticks(batches, [str(batch) for batch in batches])
            axes.minorticks_off()
            axes.set_xlabel("examples, and environments, in a batch")
        panels[0].set(ylabel="wrong labels repeated (%)", ylim=(-2, 102))
        panels[1].set(ylabel="test images right (%)")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=SMALL)
        return save(figure, path)


def _end(one: Finished[Any], which: str) -> float:
    return 100 * float(np.mean(one.record["history"][which][-3:]))


def draw_criteria(points: Mapping[str, Mapping[str, Done]], path: Path) -> Path:
    """Draw each criterion at its accuracy on both tasks."""
    with style():
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        axes.add_patch(Rectangle((99, 95), 2, 6, color=ORANGE, alpha=0.25, zorder=0))
        for number, (method, cell) in enumerate(points.items(), start=1):
            x = float(np.mean(_finals(cell["spirals"], "test")))
            y = float(np.mean([_end(one, "test") for one in cell["digits"]]))
            axes.scatter([x], [y], s=34, color=colour(method), zorder=3, clip_on=False)
            _number(axes, x, y, number)
        axes.set(xlabel="spirals: test accuracy (%)", ylabel="digits: test accuracy (%)")
        axes.set_xlim(45, 101)
        handles = [
            Line2D(
                [], [], linestyle="none", marker="o", color=colour(method), label=f"{n}  {method}"
            )
            for n, method in enumerate(points, start=1)
        ]
        figure.legend(handles=handles, loc="outside right upper", fontsize=SMALL)
        return save(figure, path)


def _number(axes: Axes, x: float, y: float, number: int) -> None:
    axes.annotate(str(number), (x, y), (4, 3), textcoords="offset points", fontsize=SMALL)
