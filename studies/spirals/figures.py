"""The figures of the study: learning curves with decision regions, and the map over tau."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from andmask_ext.plots.palette import BLUE, GREY, VERMILION

from ..figures import save
from .data import Array, SpiralsConfig, draw_spirals
from .networks import build_model
from .parts import Done

# The classes are the palette's purple and green, darkened for points and lightened for regions.
COLOURS = {"and-mask": BLUE, "mean": VERMILION}
NAMES = {"and-mask": "AND-mask", "mean": "plain training"}
CLASSES = ("#B5528A", "#00805D")
REGIONS = LinearSegmentedColormap.from_list("regions", ["#E3B0CB", "#FFFFFF", "#8CCFB9"])


def draw_curves(runs: Sequence[Done], path: Path) -> Path:
    """Draw accuracy over time for every method and seed, and the decision regions of one seed."""
    if not runs:
        raise ValueError("runs: expected at least one, got none")
    methods = [method for method in COLOURS if any(r.run.settings.method == method for r in runs)]
    figure = Figure(figsize=(5.0 + 3.3 * len(methods), 3.9), layout="constrained")
    grid = figure.add_gridspec(1, 1 + len(methods), width_ratios=[1.5] + [1.0] * len(methods))
    curves = figure.add_subplot(grid[0])
    for method in methods:
        _draw_history(curves, [r for r in runs if r.run.settings.method == method])
    _finish_history(curves, runs, methods)
    for column, method in enumerate(methods, start=1):
        axes = figure.add_subplot(grid[column])
        _draw_regions(axes, next(r for r in runs if r.run.settings.method == method))
    return save(figure, path)


def _draw_history(axes: Axes, runs: Sequence[Done]) -> None:
    colour = COLOURS[runs[0].run.settings.method]
    for which, dashes in (("test_accuracy", "-"), ("train_accuracy", (0, (4, 2)))):
        each = [100 * np.array(run.record["history"][which]) for run in runs]
        longest = max(map(len, each))
        epochs = np.arange(1, longest + 1)
        series = np.array([np.pad(one, (0, longest - len(one)), mode="edge") for one in each])
        for one in each:
            axes.plot(
                epochs[: len(one)], one, color=colour, linestyle=dashes, linewidth=0.7, alpha=0.35
            )
        axes.plot(epochs, series.mean(axis=0), color=colour, linestyle=dashes, linewidth=2.2)


def _finish_history(axes: Axes, runs: Sequence[Done], methods: Sequence[str]) -> None:
    axes.axhline(50, color=GREY, linewidth=1, linestyle=":", zorder=0)
    epochs = max(len(run.record["history"]["loss"]) for run in runs)
    axes.text(epochs, 48.6, "chance", color=GREY, fontsize=9, ha="right", va="top")
    axes.set(xlabel="epoch", ylabel="accuracy (%)", xlim=(0, epochs), ylim=(40, 103))
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], color=COLOURS[method], linewidth=2.2, label=f"{NAMES[method]}, test")
        for method in methods
    ] + [Line2D([], [], color=GREY, linewidth=2.2, linestyle=(0, (4, 2)), label="on training data")]
    axes.legend(handles=handles, framealpha=0.85, edgecolor="none", fontsize=9.5, loc="best")
    seeds = len({run.run.seed for run in runs})
    axes.set_title("one seed" if seeds == 1 else f"mean of {seeds} seeds, and each", fontsize=11)


def _draw_regions(axes: Axes, run: Done) -> None:
    data = draw_spirals(run.run.settings.data_config(), run.run.seed)
    extent = 1.12 * float(np.abs(data.test_inputs[:, :2]).max())
    axes.imshow(
        class_probability(run, extent),
        extent=(-extent, extent, -extent, extent),
        origin="lower",
        cmap=REGIONS,
        vmin=0,
        vmax=1,
        interpolation="bilinear",
    )
    shown = data.test_inputs[:900]
    with torch.no_grad():
        answers = (_network(run)(torch.from_numpy(shown)) > 0).numpy()
    colours = np.array(CLASSES)[answers.astype(int)]
    axes.scatter(shown[:, 0], shown[:, 1], s=8, c=colours, edgecolor="white", linewidth=0.25)
    axes.set(xticks=[], yticks=[], aspect="equal", xlabel="mechanism dimension 1")
    axes.set_ylabel("mechanism dimension 2", labelpad=2)
    accuracy = 100 * run.record["final"]["test_accuracy"]
    axes.set_title(
        f"{NAMES[run.run.settings.method]}: {accuracy:.1f} % test",
        color=COLOURS[run.run.settings.method],
        fontsize=11,
    )


@torch.no_grad()
def class_probability(
    run: Done, extent: float, resolution: int = 120, draws: int = 32
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Compute what a network says about points of the mechanism plane when shortcuts say nothing.

    The shortcut dimensions are drawn as at test time, and the probability of class 1 is averaged
    over the draws: a network that ignores the shortcut says 0 or 1, one that follows it one half.
    """
    settings, model = run.run.settings, _network(run)
    line = torch.linspace(-extent, extent, resolution)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    plane = torch.stack((columns, rows), dim=-1).flatten(0, 1)
    noise = torch.Generator().manual_seed(run.run.seed)
    total = torch.zeros(len(plane))
    for _ in range(draws):
        shortcut = torch.randn(settings.shortcut_dims, generator=noise)
        shortcut = (shortcut * settings.shortcut_variance**0.5).expand(len(plane), -1)
        total += model(torch.cat((plane, shortcut), dim=1)).sigmoid()
    mean: np.ndarray[Any, np.dtype[np.float32]] = (total / draws).view_as(rows).numpy()
    return mean


def _network(run: Done) -> torch.nn.Module:
    model = build_model(run.run.settings, run.run.seed)
    model.load_state_dict(run.files.read_weights())
    return model.eval()


def draw_map(runs: Sequence[Done], path: Path) -> Path:
    """Draw final test and training accuracy over tau and revolutions, averaged over seeds."""
    if not runs:
        raise ValueError("runs: expected at least one, got none")
    revolutions = sorted({run.run.settings.revolutions for run in runs})
    columns = sorted({_column(run) for run in runs})
    figure = Figure(
        figsize=(2.2 + 0.92 * len(columns), 1.6 + 1.45 * len(revolutions)), layout="constrained"
    )
    panels = figure.subplots(2, 1, sharex=True)
    for axes, which, title in (
        (panels[0], "test_accuracy", "test accuracy (%): shortcuts say nothing"),
        (panels[1], "train_accuracy", "training accuracy (%): shortcuts give the answer away"),
    ):
        values = np.array([[_mean(runs, which, r, c) for c in columns] for r in revolutions])
        image = axes.imshow(values, cmap="cividis", vmin=50, vmax=100, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            text = "" if np.isnan(value) else "100" if value > 99.95 else f"{value:.1f}"
            colour = "white" if value < 78 else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=12, color=colour)
        axes.set_title(title, fontsize=11.5)
        axes.set_yticks(range(len(revolutions)), [f"{value:g}" for value in revolutions])
        axes.set_ylabel("revolutions")
        axes.set_xticks(range(len(columns)), ["plain" if c < 0 else f"{c:g}" for c in columns])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for j in range(len(columns) - 1):
            wide = columns[j] < 0
            axes.axvline(j + 0.5, color="white", linewidth=6 if wide else 1)
        for i in range(len(revolutions) - 1):
            axes.axhline(i + 0.5, color="white", linewidth=1)
        figure.colorbar(image, ax=axes, ticks=[50, 75, 100], pad=0.01).outline.set_visible(False)
    panels[1].set_xlabel("threshold τ of the AND-mask")
    return save(figure, path)


def _mean(runs: Sequence[Done], which: str, revolutions: float, column: float) -> float:
    cell = [
        100 * run.record["final"][which]
        for run in runs
        if run.run.settings.revolutions == revolutions and _column(run) == column
    ]
    return sum(cell) / len(cell) if cell else float("nan")


def _column(run: Done) -> float:
    return run.run.settings.tau if run.run.settings.method == "and-mask" else -1.0


def draw_data(configs: Sequence[SpiralsConfig], seed: int, path: Path) -> Path:
    """Draw the mechanism of data sets, and shortcuts of a few environments of the last."""
    if not configs or configs[-1].shortcut_dims < 2:
        raise ValueError("configs: expected one or more, the last with 2 shortcut dimensions")
    reach = 1.2 * max(float(np.abs(_mechanism(config, seed)[0]).max()) for config in configs)
    figure = Figure(figsize=(2.9 * (len(configs) + 1), 3.2), layout="constrained")
    panels = figure.subplots(1, len(configs) + 1)
    for axes, config in zip(panels, configs, strict=False):
        points, labels = _mechanism(config, seed)
        for label, colour in enumerate(CLASSES):
            own = points[labels == label]
            axes.scatter(own[:, 0], own[:, 1], s=3, color=colour, label=f"class {label}")
        turns = "revolution" if config.revolutions == 1 else "revolutions"
        axes.set_title(f"mechanism, {config.revolutions:g} {turns}", fontsize=11)
        axes.set(xlabel="dimension 1", ylabel="dimension 2")
    panels[0].legend(
        frameon=False, fontsize=9, loc="upper right", markerscale=3, borderpad=0, handletextpad=0
    )

    axes, data = panels[-1], draw_spirals(configs[-1], seed)
    points = data.test_inputs[:, 2:4]
    axes.scatter(points[:, 0], points[:, 1], s=3, color="#C8C8C8", label="test, either class")
    environments = min(4, configs[-1].environments)
    for number, (x, y) in enumerate(data.shortcuts[:environments, :2], start=1):
        axes.plot([-x, x], [-y, y], color=GREY, linewidth=1)
        for sign, colour in zip((-1, 1), CLASSES, strict=True):
            axes.scatter(sign * x, sign * y, s=120, color=colour, edgecolor="white", zorder=3)
            axes.text(
                sign * x,
                sign * y,
                number,
                color="white",
                fontsize=8,
                weight="bold",
                ha="center",
                va="center_baseline",
                zorder=4,
            )
    reach_shortcut = 1.2 * float(np.quantile(np.abs(points), 0.999))
    axes.legend(
        frameon=False, fontsize=9, loc="upper right", markerscale=3, borderpad=0, handletextpad=0
    )
    axes.set(xlabel="dimension 3", ylabel="dimension 4")
    axes.set_title(f"shortcuts of {environments} environments", fontsize=11)
    for axes in panels:
        limit = reach_shortcut if axes is panels[-1] else reach
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    return save(figure, path)


def _mechanism(config: SpiralsConfig, seed: int) -> tuple[Array, Array]:
    data = draw_spirals(config, seed)
    return data.test_inputs[:, :2], data.test_labels
