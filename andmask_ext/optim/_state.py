"""Optimizer state that is wider than its parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def load_wide_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load float32 state of 16-bit parameters again: torch has rounded it to their dtype."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    ids = [index for group in state_dict["param_groups"] for index in group["params"]]
    for param, index in zip(params, ids, strict=True):
        if param.dtype not in (torch.float16, torch.bfloat16):
            continue
        for key, value in state_dict["state"].get(index, {}).items():
            if isinstance(value, Tensor) and value.is_floating_point() and key != "step":
                wide = value.detach().to(param.device, torch.float32, copy=True)
                optimizer.state[param][key] = wide


def zeros_like_wide(param: Tensor) -> Tensor:
    """Return state for a parameter: float32, or float64 for float64, in its layout."""
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    return torch.zeros_like(param.detach(), dtype=wide)
