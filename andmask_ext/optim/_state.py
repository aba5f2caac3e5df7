"""Optimizer state that is wider than its parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._dtypes import wide_dtype


def load_wide_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Restore state that ``torch.optim.Optimizer.load_state_dict`` has changed.

    Torch rounds float32 state of 16-bit parameters to the parameter's dtype. It leaves step counts
    on the device that they were saved from.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    ids = [index for group in state_dict["param_groups"] for index in group["params"]]
    for param, index in zip(params, ids, strict=True):
        state = optimizer.state.get(param, {})
        if "step" in state:
            state["step"] = state["step"].to(param.device)
        if param.dtype not in (torch.float16, torch.bfloat16):
            continue
        for key, value in state_dict["state"].get(index, {}).items():
            if isinstance(value, Tensor) and value.is_floating_point() and key != "step":
                wide = value.detach().to(param.device, torch.float32, copy=True)
                optimizer.state[param][key] = wide


def no_steps(param: Tensor) -> Tensor:
    """Return a step count of zero on the parameter's device, where CUDA kernels update it."""
    return torch.zeros((), dtype=torch.float32, device=param.device)


def zeros_like_wide(param: Tensor) -> Tensor:
    """Return zeros in the parameter's shape and layout: float64 for float64, else float32."""
    return torch.zeros_like(param.detach(), dtype=wide_dtype(param))
