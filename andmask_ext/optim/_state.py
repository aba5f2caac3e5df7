"""Optimizer state: how it is made, and how it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._dtypes import wide_dtype
from .._pending import PendingStep, State
from ._rules import with_rules

_OPTIONAL = ("max_exp_avg_sq", "sign_avg")


def load_state(
    optimizer: Optimizer,
    load: Callable[[dict[str, Any]], None],
    state_dict: dict[str, Any],
    needed: Sequence[str],
    finish: Callable[[dict[str, Any]], None],
) -> None:
    """Load a state in the place that torch gives it: between the hooks before and after.

    Args:
        optimizer: its hooks before may replace the state.
        load: ``torch.optim.Optimizer.load_state_dict``.
        state_dict: the state.
        needed: what the state of a parameter holds, unless it is empty.
        finish: called with the state that was loaded.
    """
    loaded: list[dict[str, Any]] = []

    def take(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        _check_state(optimizer, state, needed)
        loaded.append({**state, "param_groups": with_rules(state["param_groups"])})
        return loaded[0]

    def end(_: Optimizer) -> None:
        _load_wide_state(optimizer, loaded[0])
        unshare(optimizer, loaded[0])
        finish(loaded[0])

    handles = [
        optimizer.register_load_state_dict_pre_hook(take),
        optimizer.register_load_state_dict_post_hook(end, prepend=True),
    ]
    try:
        load(state_dict)
    finally:
        for handle in handles:
            handle.remove()


def unshare(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Copy the tensors that a loaded state shares with the optimizer that it was taken from.

    Torch shares them. Two optimizers that go on from one state then change each other's.
    """
    given = {
        id(value)
        for state in state_dict["state"].values()
        if isinstance(state, dict)
        for value in state.values()
    }
    for state in optimizer.state.values():
        for key, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, Tensor) and id(value) in given:
                state[key] = value.clone()


def _check_state(optimizer: Optimizer, state_dict: dict[str, Any], needed: Sequence[str]) -> None:
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            "state_dict: expected the keys state and param_groups, but got "
            f"{', '.join(map(str, state_dict)) or 'none'}; save optimizer.state_dict()"
        )
    params = [param for group in optimizer.param_groups for param in group["params"]]
    ids = [index for group in state_dict["param_groups"] for index in group["params"]]
    for param, index in zip(params, ids, strict=False):  # torch compares the numbers
        saved = state_dict["state"].get(index, {})
        missing = [key for key in needed if saved and key not in saved]
        if missing:
            raise ValueError(
                f"state_dict: expected {', '.join(needed)} of parameter {index}, but got "
                f"{', '.join(map(str, saved))}; load a state of {type(optimizer).__name__} or of "
                "the optimizer of torch with its update"
            )
        for key, value in saved.items():
            tensor = key in (*needed, *_OPTIONAL) and key != "step" and value is not None
            if tensor and getattr(value, "shape", None) != param.shape:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(
                    f"state_dict: expected {key} of parameter {index} of shape "
                    f"{tuple(param.shape)}, but got {got}; load the state of a model of this shape"
                )


def _load_wide_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Restore state that ``torch.optim.Optimizer.load_state_dict`` has changed.

    Torch rounds float32 state of 16-bit parameters to the parameter's dtype. It leaves step counts
    on the device that they were saved from.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    ids = [index for group in state_dict["param_groups"] for index in group["params"]]
    for param, index in zip(params, ids, strict=True):
        state = optimizer.state.get(param, {})
        if "step" in state:
            state["step"] = _count(state["step"], param)
        if param.dtype not in (torch.float16, torch.bfloat16):
            continue
        for key, value in state_dict["state"].get(index, {}).items():
            if isinstance(value, Tensor) and value.is_floating_point() and key != "step":
                wide = value.detach().to(param.device, torch.float32, copy=True)
                optimizer.state[param][key] = wide


def makes_only_state(optimizer: Optimizer, pending: PendingStep) -> bool:
    """Return whether ``step`` is called to create the state of a fresh optimizer.

    ``torch.distributed.checkpoint`` does so, with a learning rate of zero and gradients of zero.
    """
    if pending.state is not State.IDLE or any(optimizer.state.values()):
        return False
    grads = [param.grad for group in optimizer.param_groups for param in group["params"]]
    given = [grad for grad in grads if grad is not None]
    still = all(float(group.get("lr", 0)) == 0 for group in optimizer.param_groups)
    return bool(given) and still and not any(bool(grad.any()) for grad in given)


def steps_of(state: dict[str, Any], param: Tensor) -> Tensor:
    """Return the step count, zero at first, on the parameter's device: CUDA kernels update it."""
    count = state["step"] = _count(state.get("step", 0), param)
    return count


def _count(value: Any, param: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=param.device)


def average_of(state: dict[str, Any], key: str, param: Tensor) -> Tensor:
    """Return a running average of a parameter, zero at first.

    It follows a model that is cast or moved: float64 for float64, else float32.
    """
    value = state.get(key)
    if value is None:
        value = zeros_like_wide(param)
    average: Tensor = value.to(param.device, wide_dtype(param))
    state[key] = average
    return average


def zeros_like_wide(param: Tensor) -> Tensor:
    """Return zeros in the parameter's shape and layout: float64 for float64, else float32."""
    return torch.zeros_like(param.detach(), dtype=wide_dtype(param))
