"""Models and losses that many tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def mlp(inputs: int = 4, hidden: int = 5, outputs: int = 3, *middle: nn.Module) -> nn.Sequential:
    """Two linear layers, with ``middle`` between them (a tanh by default)."""
    middle = middle or (nn.Tanh(),)
    return nn.Sequential(nn.Linear(inputs, hidden), *middle, nn.Linear(hidden, outputs))


def curved(model: nn.Module, *inputs: Any) -> Tensor:
    """A mean loss whose gradient is another one for each example, in both signs."""
    out = model(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    out = out if out.dtype == torch.float64 else out.float()
    return (out.sin() + 0.3 * out).mean()
