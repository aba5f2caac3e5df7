"""The figures: correlations under both masks, and under other conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from andmask_ext.plots.palette import GREY
from andmask_ext.plots.style import LINES, style

from ..figures import save
from .measuring import MASKS, SIGNALS, curve, where_enough


def _draw(axes: Axes, tau: Tensor, values: Tensor, number: int, label: str | None = None) -> None:
    line, values = LINES[number], where_enough(values)
    mean = values.nanmean(0)
    around = (values - mean).square().nanmean(0).sqrt()
    axes.plot(tau, mean, **line._asdict(), markersize=3.5, label=label)
    axes.fill_between(tau, mean - around, mean + around, color=line.color, alpha=0.15, linewidth=0)


def draw_main(records: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw correlations under both masks, and how many coordinates are left."""
    tau = torch.tensor(records[0]["tau"])
    with style():
        figure = Figure(figsize=(9.4, 3.3), layout="constrained")
        panels = figure.subplots(1, 3)
        for axes, mask, title in zip(panels, MASKS, ("AND-mask", "XOR-mask"), strict=False):
            for number, name in enumerate(SIGNALS):
                _draw(axes, tau, curve(records, mask, "plain", name), number, name)
            axes.axhline(0, color=GREY, linewidth=0.8, zorder=0)
            axes.set(title=title, xlabel="threshold τ", ylim=(-0.5, 1.05), xlim=(0, 1))
        panels[0].set_ylabel("correlation")
        panels[1].legend(loc="lower right", title="left in the data", title_fontsize=8.5)
        last = panels[2]
        kept = torch.tensor([record["kept"] for record in records], dtype=torch.float64)
        for values, number, label in (
            (kept, 0, "AND-mask"),
            (1 - kept, 1, "XOR-mask"),
        ):
            _draw(last, tau, 100 * values.where(values > 0, torch.nan), number, label)
        noise = 100 * torch.tensor(records[0]["noise"])
        last.plot(tau, noise, color=GREY, linestyle=":", label="AND-mask, pure noise")
        last.set(yscale="log", xlabel="threshold τ", xlim=(0, 1), title="coordinates left (%)")
        last.legend(loc="lower left")
        return save(figure, path)


def draw_conditions(groups: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path:
    """Draw the correlations of the AND-mask in each condition, a panel for each."""
    with style():
        figure = Figure(figsize=(1.2 + 1.95 * len(groups), 2.9), layout="constrained")
        panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        for axes, (condition, records) in zip(panels, groups.items(), strict=True):
            tau = torch.tensor(records[0]["tau"])
            for number, name in enumerate(SIGNALS):
                _draw(axes, tau, curve(records, "and", "plain", name), number, name)
                masked = where_enough(curve(records, "and", "masked", name)).nanmean(0)
                axes.plot(tau, masked, color=LINES[number].color, linestyle=(0, (4, 2)), zorder=1)
            axes.axhline(0, color=GREY, linewidth=0.8, zorder=0)
            axes.set(title=condition, xlabel="threshold τ", xlim=(0, 1), ylim=(-0.6, 1.05))
            axes.set_xticks((0, 0.5, 1), ("0", ".5", "1"))
        panels[0].set_ylabel("correlation")
        panels[0].legend(loc="lower left")
        return save(figure, path)
