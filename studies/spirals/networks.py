"""The networks: one for most methods, three that play against each other for DANN."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from .settings import Settings


def build_model(settings: Settings, seed: int) -> nn.Module:
    """Build the LeakyReLU network of the paper, with the initial weights of the authors' code."""
    generator = torch.Generator().manual_seed(seed)
    inputs, width = 2 + settings.shortcut_dims, settings.width
    if settings.method == "dann":
        return Adversaries(inputs, width, settings.environments, generator)
    widths = [inputs, *[width] * settings.layers]
    hidden: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        hidden.append(linear(fan_in, fan_out, generator))
        if settings.method == "batch-norm":
            hidden.append(nn.BatchNorm1d(fan_out))
        hidden.append(nn.LeakyReLU())
        if settings.method == "dropout":
            hidden.append(nn.Dropout(settings.dropout))
    return nn.Sequential(*hidden, linear(width, 1, generator), nn.Flatten(-2))


def linear(fan_in: int, fan_out: int, generator: torch.Generator) -> nn.Linear:
    """Build a layer with Kaiming-normal weights and biases of .01."""
    layer = nn.Linear(fan_in, fan_out)
    nn.init.kaiming_normal_(layer.weight, generator=generator)
    nn.init.constant_(layer.bias, 0.01)
    return layer


class Adversaries(nn.Module):
    """DANN: features, from which one classifier tells labels and another one environments.

    Each of the three has two linear layers, as in the paper.

    Reference:
        Ganin et al., *Domain-adversarial training of neural networks*, JMLR 2016.
    """

    def __init__(
        self, inputs: int, width: int, environments: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            linear(inputs, width, generator),
            nn.LeakyReLU(),
            linear(width, width, generator),
            nn.LeakyReLU(),
        )
        self.label = nn.Sequential(
            linear(width, width, generator),
            nn.LeakyReLU(),
            linear(width, 1, generator),
            nn.Flatten(-2),
        )
        self.environment = nn.Sequential(
            linear(width, width, generator),
            nn.LeakyReLU(),
            linear(width, environments, generator),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of the labels; the game is played in training only."""
        logits: Tensor = self.label(self.features(inputs))
        return logits
