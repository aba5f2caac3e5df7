"""Draw the figures of docs that show landscapes: python tools/figures_metrics.py.

Writes docs/figures/landscapes.png, trajectories.png and ellipses.png; takes a few seconds, and
gives the same files every time.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from PIL import Image

from andmask_ext import plots
from andmask_ext.metrics import landscapes

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
STARTS = torch.tensor(
    [[-2.7, -0.5], [0.2, 2.7], [-1.2, -1.6], [2.7, -2.2], [0.7, -2.8], [2.3, 1.3]]
).double()


def draw_landscapes() -> Figure:
    """Two minima that look alike after pooling, of which one is in both environments."""
    example = landscapes.two_minima()
    return plots.loss_landscapes(example.losses, example.bounds, points=example.points)[0].figure


def draw_trajectories() -> Figure:
    """The same losses, and where the mean gradient and the AND-mask lead."""
    example = landscapes.two_minima()
    panels = plots.trajectories(
        example.losses, STARTS, steps=600, bounds=example.bounds, points=example.points
    )
    return panels[0].figure


def draw_ellipses() -> Figure:
    """Pairs of quadratics that differ little, and more, and by a turn."""
    turn = torch.tensor([[3.0, -4.0], [4.0, 3.0]]).double() / 5
    steep = torch.tensor([10.0, 0.5]).double().diag()
    pairs = {
        "similar": torch.stack([torch.diag(torch.tensor(d).double()) for d in ([2, 1], [1, 2])]),
        "across each other": torch.stack([steep, steep.flip(0, 1)]),
        "turned": torch.stack([steep, turn @ steep @ turn.T]),
    }
    figure, panels = plt.subplots(
        1, 3, figsize=(8.3, 3.5), layout="constrained", sharex=True, sharey=True
    )
    for axes, (name, hessians) in zip(panels, pairs.items(), strict=True):
        plots.ellipses(hessians, ax=axes)
        ratio = axes.get_title().rpartition(" ")[2]
        axes.set_title(f"{name}, ratio {ratio}", fontsize=10.5)
        axes.label_outer()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    return figure


def write(figure: Figure, path: Path) -> None:
    """Save with 256 colours: a third of the bytes, and no difference that one sees."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=160)
    image = Image.open(picture).convert("RGB")
    image = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    image.save(path, format="png", optimize=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--output", type=Path, default=FIGURES, help="folder (docs/figures)")
    output = options.parse_args().output
    for name, draw in (
        ("landscapes", draw_landscapes),
        ("trajectories", draw_trajectories),
        ("ellipses", draw_ellipses),
    ):
        path = output / f"{name}.png"
        figure = draw()
        write(figure, path)
        plt.close(figure)
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
