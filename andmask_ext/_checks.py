"""Argument checks. Messages name the argument, the expected value and the actual value."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._dtypes import dtype_name

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raise unless the kernels support the dtype of ``tensor``."""
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{name}: expected dtype float16, bfloat16, float32 or float64, "
            f"but got {dtype_name(tensor.dtype)}"
        )


def check_dense_grad(name: str, grad: Tensor) -> None:
    """Raise unless the gradient is dense."""
    if grad.layout != torch.strided:
        raise TypeError(
            f"{name}: expected a dense gradient of shape {tuple(grad.shape)}, but got layout "
            f"{str(grad.layout).removeprefix('torch.')} (an embedding with sparse=True?)"
        )


def check_grads(grads: object, name: str = "grads") -> None:
    """Raise unless ``grads`` is a dense floating-point tensor ``[environments >= 1, *shape]``."""
    if not isinstance(grads, Tensor):
        raise TypeError(f"{name}: expected a Tensor, but got {type(grads).__name__}")
    check_dtype(name, grads)
    check_dense_grad(name, grads)
    if grads.dim() == 0:
        raise ValueError(f"{name}: expected shape [environments, *shape], but got a 0-dim tensor")
    if grads.shape[0] == 0:
        raise ValueError(f"{name}: expected at least 1 environment (dim 0), but got 0")


def check_tau(tau: object) -> None:
    """Raise unless ``tau`` is a Python number in [0, 1].

    A float32 scalar is refused, because it misses ties. For example, ``numpy.float32(0.8)`` is
    0.80000001, so 80 votes of 100 would not be enough.
    """
    if isinstance(tau, bool) or not isinstance(tau, (int, float)):
        raise TypeError(f"tau: expected a Python number in [0, 1], but got {type(tau).__name__}")
    if not 0 <= tau <= 1:
        raise ValueError(f"tau: expected a number in [0, 1], but got {tau}")


def check_number(name: str, value: object, expected: str, holds: Callable[[float], bool]) -> None:
    """Raise unless ``value`` is a Python number for which ``holds`` is true."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {expected}, but got {type(value).__name__}")
    if not holds(value):
        raise ValueError(f"{name}: expected {expected}, but got {value}")


def check_bool(name: str, value: object) -> None:
    """Raise unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, but got {type(value).__name__}")


def check_weight(weight: object, name: str = "weight") -> None:
    """Raise unless ``weight`` is a positive finite number."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"{name}: expected a number, but got {type(weight).__name__}")
    if not 0 < weight < float("inf"):
        raise ValueError(f"{name}: expected a positive finite number, but got {weight}")


def check_count(name: str, value: object, least: int) -> None:
    """Raise unless ``value`` is an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, but got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, but got {value}")


def check_generator(generator: object) -> None:
    """Raise unless ``generator`` is a torch.Generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: expected a torch.Generator or None, but got {type(generator).__name__}"
        )
