"""The networks that the benchmarks train, with a batch for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def mlp(width: int = 1024) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def cnn() -> nn.Module:
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


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def fast_resnet() -> nn.Module:
    """The ResNet-9 of DAWNBench's fast CIFAR-10 entries, with group norm."""

    def block(before: int, after: int, *rest: nn.Module) -> nn.Module:
        convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.GroupNorm(32, after), nn.ReLU(), *rest)

    return nn.Sequential(
        block(3, 64),
        block(64, 128, nn.MaxPool2d(2)),
        Residual(block(128, 128), block(128, 128)),
        block(128, 256, nn.MaxPool2d(2)),
        block(256, 512, nn.MaxPool2d(2)),
        Residual(block(512, 512), block(512, 512)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


class Transformer(nn.Module):
    """One block on 64 tokens of 256, and a classifier of their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 256)
        self.block = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
        self.head = nn.Linear(256, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens)).mean(1))


def _labels(examples: int) -> Tensor:
    return torch.randint(0, 10, (examples,))


# Name: model, batch of n examples, examples in a batch of plain training.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch], int]] = {
    "MLP": (mlp, lambda n: (torch.randn(n, 1024), _labels(n)), 128),
    "CNN": (cnn, lambda n: (torch.randn(n, 3, 32, 32), _labels(n)), 80),
    "transformer": (
        Transformer,
        lambda n: (torch.randint(0, 1000, (n, 64)), _labels(n)),
        32,
    ),
    "ResNet-9": (fast_resnet, lambda n: (torch.randn(n, 3, 32, 32), _labels(n)), 80),
}


def environments(model: str, count: int) -> tuple[nn.Module, list[Batch]]:
    """Return a fresh model, and its usual batch split evenly between environments."""
    torch.manual_seed(0)
    build, batch, examples = MODELS[model]
    network = build()
    return network, [batch(max(1, examples // count)) for _ in range(count)]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])
