"""Checks of arguments that several functions take."""

from __future__ import annotations

import math

import torch

from ..._checks import check_number


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


def check_eps(eps: object) -> None:
    """Raise unless ``eps`` is a positive finite number."""
    check_number("eps", eps, "a positive finite number", lambda value: 0 < value < math.inf)
