"""The network: ResNet-18, narrower."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHANNELS_OF_A_GROUP = 8


class Block(nn.Module):
    """Two convolutions, each 3 by 3, and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = _norm(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = _norm(outputs)
        self.around: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            around = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.around = nn.Sequential(around, _norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return features of shape [n, outputs, height / stride, width / stride]."""
        inside = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(inside)) + self.around(x))


class PolicyNetwork(nn.Module):
    """From a frame to the log-odds of the actions: ResNet-18 with ``width`` instead of 64 channels.

    Group norm takes the place of batch norm: as all frames of a training step come from one level,
    the statistics of a batch would be those of a level, and others than those used in the game.
    """

    def __init__(self, width: int, actions: int) -> None:
        super().__init__()
        if width < 1 or width % CHANNELS_OF_A_GROUP:
            raise ValueError(f"width: expected a multiple of {CHANNELS_OF_A_GROUP}, got {width}")
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            _norm(width),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        blocks, channels = [], width
        for stage in range(4):
            for stride in (1 if stage == 0 else 2, 1):
                blocks.append(Block(channels, width << stage, stride))
                channels = width << stage
        self.stages = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, actions)
        for parameter in self.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def forward(self, frames: Tensor) -> Tensor:
        """Return logits."""
        x = (frames.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return logits


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // CHANNELS_OF_A_GROUP, channels)
