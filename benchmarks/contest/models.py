"""The networks that benchmarks train, with a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studies.label_noise.networks import fast_resnet

Batch = tuple[Tensor, Tensor]


class Workload(NamedTuple):
    """A network and its data."""

    build: Callable[[], nn.Module]  # with weights from torch's global generator
    draw: Callable[[int], Batch]  # a batch of so many examples, likewise
    examples: int  # in a usual batch of plain training


def mlp(width: int = 1024) -> nn.Module:
    """Return a network of two hidden layers: many parameters, little to compute for each."""
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def cnn() -> nn.Module:
    """Return five convolutions with group norm: few parameters, much to compute for each."""

    def block(before: int, after: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.GroupNorm(8, after),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *block(3, 32, 1),
        *block(32, 64, 1),
        *block(64, 64, 2),
        *block(64, 128, 2),
        *block(128, 128, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


class Transformer(nn.Module):
    """One block on tokens of 256 numbers, and a classifier of their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 256)
        self.block = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
        self.head = nn.Linear(256, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores of 10 classes for token numbers ``[batch, length]``."""
        scores: Tensor = self.head(self.block(self.embedding(tokens)).mean(1))
        return scores


def _labels(examples: int) -> Tensor:
    return torch.randint(0, 10, (examples,))


def _images(examples: int) -> Batch:
    return torch.randn(examples, 3, 32, 32), _labels(examples)


def _vectors(width: int) -> Callable[[int], Batch]:
    return lambda examples: (torch.randn(examples, width), _labels(examples))


MODELS: dict[str, Workload] = {
    "MLP": Workload(mlp, _vectors(1024), 128),
    "CNN": Workload(cnn, _images, 80),
    "transformer": Workload(
        Transformer,
        lambda examples: (torch.randint(0, 1000, (examples, 64)), _labels(examples)),
        32,
    ),
    "ResNet-9": Workload(fast_resnet, _images, 80),
}


def workload(name: str) -> Workload:
    """Find a network by its name: one of MODELS, or ``MLP 512`` for the MLP of that width."""
    family, _, width = name.partition(" ")
    if family == "MLP" and width.isdecimal() and int(width):
        return Workload(lambda: mlp(int(width)), _vectors(int(width)), MODELS["MLP"].examples)
    if name not in MODELS:
        raise ValueError(f"models: expected {', '.join(MODELS)} or such as 'MLP 512', got {name!r}")
    return MODELS[name]


def setting(name: str, examples: int | None = None, seed: int = 0) -> tuple[nn.Module, Batch]:
    """Make a network and a batch."""
    torch.manual_seed(seed)
    chosen = workload(name)
    return chosen.build(), chosen.draw(examples or chosen.examples)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross entropy of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])
