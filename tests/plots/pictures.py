"""What the tests of figures share: data to draw, and a look at what was drawn."""

from dataclasses import dataclass, field
from math import comb

import numpy as np
import torch
from torch import Tensor


def noise_votes(environments: int) -> Tensor:
    """The distribution of ``|votes|`` of fair signs, by counting."""
    ways = [0] * (environments + 1)
    for plus in range(environments + 1):
        ways[abs(2 * plus - environments)] += comb(environments, plus)
    return torch.tensor([way / 2**environments for way in ways], dtype=torch.float64)


@dataclass
class Histogram:
    environments: int
    counts: Tensor
    noise: Tensor = field(init=False)

    def __post_init__(self):
        self.noise = noise_votes(self.environments)

    @classmethod
    def of_noise(cls, environments, coordinates=2000, zeros=0.0):
        """Count votes of random signs, some of which are 0."""
        signs = torch.randint(2, (environments, coordinates)) * 2 - 1
        signs[torch.rand(environments, coordinates) < zeros] = 0
        counts = torch.bincount(signs.sum(0).abs(), minlength=environments + 1)
        return cls(environments, counts)


@dataclass
class Curve:
    tau: Tensor
    kept_fraction: Tensor
    noise_kept_fraction: Tensor
    norm: Tensor

    @classmethod
    def of(cls, histogram):
        tail = [
            values.double().flip(0).cumsum(0).flip(0)
            for values in (histogram.counts, histogram.noise)
        ]
        kept = tail[0] / tail[0][0].clamp(min=1)
        steps = torch.arange(histogram.environments + 1).double()
        return cls(steps / histogram.environments, kept, tail[1], 3 * kept.sqrt())


@dataclass
class Monitor:
    steps: list
    names: list
    values: dict

    def series(self, metric):
        return self.values[metric]

    @classmethod
    def of(cls, records, parameters, kept=None):
        kept = torch.rand(records, parameters) if kept is None else kept
        return cls(
            list(range(0, 10 * records, 10)),
            [f"layer{number}.weight" for number in range(parameters)],
            {
                "kept_fraction": kept,
                "noise_kept_fraction": torch.full_like(kept, 0.25),
                "threshold": torch.where(kept > 0, 1 - kept / 2, 1.125),
                "noise_share": torch.where(kept > 0, kept / 4, torch.nan),
            },
        )


@dataclass
class Correlations:
    tau: Tensor
    correlations: dict


@dataclass
class ByInput:
    share: Tensor
    noise: Tensor
    own: Tensor
    tau: float = 0.8
    kind: str = "features"

    @classmethod
    def of(cls, *shape, kind="features"):
        return cls(torch.rand(shape), torch.full(shape, 0.25), torch.rand(shape), kind=kind)


def draw(axes):
    """Render the figure of one axes or of a list, and return it."""
    figure = (axes[0] if isinstance(axes, list) else axes).figure
    if figure.stale:
        figure.canvas.draw()
    return figure


def colour_at(axes, x, y):
    """Return the colour that a reader sees at a place in data coordinates, red, green and blue."""
    pixels = np.asarray(draw(axes).canvas.buffer_rgba())
    column, row = axes.transData.transform((x, y))
    return pixels[pixels.shape[0] - 1 - round(row), round(column), :3].astype(int)


def texts(axes):
    """Return what is written inside the axes."""
    return "\n".join(text.get_text() for text in axes.texts)
