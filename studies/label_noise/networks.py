"""The network of the study: the small residual one of fast CIFAR-10 training."""

from __future__ import annotations

import math

from torch import Tensor, nn

import andmask_ext as am

NORMS = ("group", "batch")


class Residual(nn.Module):
    """Layers around which the input goes unchanged."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input plus what the layers make of it."""
        total: Tensor = x + self.layers(x)
        return total


def fast_resnet(
    channels: int = 3, classes: int = 10, width: int = 64, norm: str = "group", groups: int = 32
) -> nn.Sequential:
    """Build the ResNet-9 of DAWNBench's fast CIFAR-10 entries, with a norm that suits environments.

    Eight convolutions of width 1, 2, 4 and 8 times ``width``, two blocks with a shortcut, three
    poolings by two: images need sides of at least 8. With ``norm="group"`` each example is treated
    by itself. With ``"batch"`` the network is converted by
    :func:`andmask_ext.nn.convert_batchnorm`: inside of an agreement's context its statistics are
    those of an environment. Where every example is one, they are over positions of one image only.
    """
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")

    def block(before: int, after: int, *rest: nn.Module) -> nn.Module:
        convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
        layer = (
            nn.BatchNorm2d(after)
            if norm == "batch"
            else nn.GroupNorm(math.gcd(groups, after), after)
        )
        return nn.Sequential(convolution, layer, nn.ReLU(), *rest)

    return am.nn.convert_batchnorm(
        nn.Sequential(
            block(channels, width),
            block(width, 2 * width, nn.MaxPool2d(2)),
            Residual(block(2 * width, 2 * width), block(2 * width, 2 * width)),
            block(2 * width, 4 * width, nn.MaxPool2d(2)),
            block(4 * width, 8 * width, nn.MaxPool2d(2)),
            Residual(block(8 * width, 8 * width), block(8 * width, 8 * width)),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(8 * width, classes),
        )
    )
