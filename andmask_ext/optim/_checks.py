"""Checks of optimizer options."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._base import WEIGHT_DECAYS


def check_lr(lr: object) -> None:
    """Raise unless ``lr`` is a number >= 0 or a tensor of one."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr: expected a tensor of one element, but got shape {lr.shape}")
        return
    check_range("lr", lr, 0.0)


def check_range(
    name: str, value: object, low: float, high: float = float("inf"), end: bool = False
) -> None:
    """Raise unless ``value`` is a number in ``[low, high)``, or ``[low, high]`` with ``end``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, but got {type(value).__name__}")
    if not (low <= value < high or (end and value == high)):
        closing = "]" if end else ")"
        raise ValueError(
            f"{name}: expected a number in [{low:g}, {high:g}{closing}, but got {value}"
        )


def check_betas(betas: Any, count: int) -> None:
    """Raise unless ``betas`` are ``count`` numbers in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != count:
        raise ValueError(f"betas: expected {count} numbers, but got {betas!r}")
    for index, beta in enumerate(betas):
        if isinstance(beta, Tensor):
            raise TypeError(f"betas[{index}]: expected a number, but got Tensor")
        check_range(f"betas[{index}]", beta, 0.0, 1.0)


def check_weight_decay(group: dict[str, Any]) -> None:
    """Raise unless the weight decay is in range and its mode is known."""
    check_range("weight_decay", group["weight_decay"], 0.0)
    if group["weight_decay_mode"] not in WEIGHT_DECAYS:
        raise ValueError(
            f"weight_decay_mode: expected one of {', '.join(WEIGHT_DECAYS)}, "
            f"but got {group['weight_decay_mode']!r}"
        )


def decay_after_mask(group: dict[str, Any]) -> float:
    """Return the decay that the native step applies: 0 if the moments already include it."""
    return 0.0 if group["weight_decay_mode"] == "before_mask" else group["weight_decay"]
