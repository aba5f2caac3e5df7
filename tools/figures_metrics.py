"""Draw the figures of docs/metrics.md: python -m tools.figures_metrics.

Trains a small network on the spirals for some of them (half a minute), and writes PNG files into
docs/figures.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

import andmask_ext as am
from andmask_ext import metrics, plots
from studies.figures import save
from studies.spirals.data import SpiralsConfig, draw_spirals
from tools.diagnosis import as_images, hospitals, network, train_plainly

FIGURES = Path(__file__).parents[1] / "docs" / "figures"

# ---- a network that memorises the spirals ----

ENVIRONMENTS, EXAMPLES = 16, 512


@dataclass
class Run:
    """Gradients of each environment before and after plain training, and what a monitor saw."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    monitor: metrics.Monitor


@cache
def plain_training(steps: int = 300) -> Run:
    """Train on the pooled loss, and watch what unanimity would have kept."""
    data = draw_spirals(SpiralsConfig(environments=ENVIRONMENTS, examples=EXAMPLES), seed=0)
    inputs = torch.from_numpy(data.train_inputs).view(ENVIRONMENTS, EXAMPLES, -1)
    labels = torch.from_numpy(data.train_labels).view(ENVIRONMENTS, EXAMPLES)
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for into in (inputs.shape[2], 256, 256):
        layers += [nn.Linear(into, 256), nn.LeakyReLU()]
    model = nn.Sequential(*layers, nn.Linear(256, 1))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(x)[:, 0], y)

    def gradients() -> dict[str, Tensor]:
        names = [name for name, _ in model.named_parameters()]
        rows = [
            torch.autograd.grad(loss(x, y), list(model.parameters()))
            for x, y in zip(inputs, labels, strict=True)
        ]
        columns = zip(*rows, strict=True)
        return {name: torch.stack(column) for name, column in zip(names, columns, strict=True)}

    before = gradients()
    optimizer = am.optim.AndMaskAdam(model.parameters(), lr=1e-3, tau=0.0)  # the plain mean
    agreement = am.Agreement(model, optimizer)
    monitor = metrics.Monitor(agreement, tau=1.0, every=5)
    for _ in range(steps):
        chosen = torch.randint(0, EXAMPLES, (128,))
        with agreement(ENVIRONMENTS):
            loss(inputs[:, chosen].flatten(0, 1), labels[:, chosen].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Run(before, gradients(), monitor)


def draw_votes() -> Figure:
    """Votes beside noise, before and after training."""
    run = plain_training()
    figure, panels = plt.subplots(1, 2, figsize=(8.3, 3.3), layout="constrained", sharey=True)
    for axes, grads, title in zip(
        panels, (run.before, run.after), ("before training", "after 300 steps"), strict=True
    ):
        plots.vote_histogram(metrics.vote_histogram(grads), tau=1.0, ax=axes)
        axes.set_title(title)
        axes.label_outer()
    return figure


def draw_tau_curve() -> Figure:
    """What every threshold would keep after training."""
    curve = metrics.tau_curve(plain_training().after)
    figure, panels = plt.subplots(2, figsize=(7.2, 4.4), layout="constrained", sharex=True)
    plots.tau_curve(curve, ax=panels[0])
    plots.masked_norm(curve, ax=panels[1])
    panels[0].label_outer()
    return figure


def draw_cosines() -> Figure:
    """Angles between the gradients of environments, before and after training."""
    run = plain_training()
    figure, panels = plt.subplots(1, 2, figsize=(8.3, 3.9), layout="constrained")
    for axes, grads, title in zip(
        panels, (run.before, run.after), ("before training", "after 300 steps"), strict=True
    ):
        plots.gradient_cosines(metrics.gradient_cosines(grads), ax=axes)
        axes.set(title=title, xticks=range(0, ENVIRONMENTS, 3), yticks=range(0, ENVIRONMENTS, 3))
    return figure


def draw_kept_fraction() -> Figure:
    """What unanimity would keep of each layer, over plain training."""
    return plots.kept_fraction(plain_training().monitor).figure


def draw_inputs() -> Figure:
    """Shortcuts that point in different directions, and one that differs in strength."""
    figure, panels = plt.subplots(2, 2, figsize=(8.3, 6.2), layout="constrained")
    titles = {
        "code": "marker of differing meaning",
        "strength": "marker of differing reliability",
    }
    for row, (kind, title) in zip(panels, titles.items(), strict=True):
        environments = [(as_images(x), y) for x, y in hospitals(kind)[0]]
        model = network("CNN", 0)
        for _ in train_plainly(model, environments, 20):
            pass
        result = metrics.input_agreement(model, environments, F.cross_entropy, tau=0.8)
        for axes, own in zip(row, (False, True), strict=True):
            plots.input_agreement(result, own=own, ax=axes)
            axes.add_patch(Rectangle((7.5, -0.5), 2, 5, fill=False, linewidth=1.6))
        row[0].set_title(title)
    return figure


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--output", type=Path, default=FIGURES, help="folder (docs/figures)")
    output = options.parse_args().output
    for name, draw in (
        ("votes", draw_votes),
        ("tau_curve", draw_tau_curve),
        ("cosines", draw_cosines),
        ("kept_fraction", draw_kept_fraction),
        ("inputs", draw_inputs),
    ):
        path = output / f"{name}.png"
        figure = draw()
        save(figure, path)
        plt.close(figure)
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
