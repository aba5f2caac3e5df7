"""Shared parts of the figures: axes, checks of arguments, labels."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any, Final

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from . import palette

Array = np.ndarray[Any, np.dtype[Any]]

# Vermilion is conflict, blue is agreement. Blue ends darker, so the ends also differ in grey.
DIVERGING: Final = LinearSegmentedColormap.from_list(
    "conflict", [palette.VERMILION, "#F3C9A5", "#FFFFFF", "#8DBFE0", "#00456F"]
).with_extremes(bad="#BBBBBB")


def axes_or_new(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return ``ax``, or the axes of a new figure of this size in inches."""
    if ax is None:
        return plt.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise TypeError(f"ax: expected matplotlib Axes, but got {type(ax).__name__}")
    return ax


def environment_names(count: int, labels: Sequence[str] | None) -> list[str]:
    """Return ``labels``. Default: A, B, C and so on, or numbers if there are too few letters."""
    if labels is None:
        letters = count <= len(string.ascii_uppercase)
        return list(string.ascii_uppercase[:count]) if letters else [str(i) for i in range(count)]
    if isinstance(labels, str) or len(labels) != count:
        raise ValueError(f"labels: expected {count}, one for each environment, but got {labels!r}")
    return list(labels)


def check_has(name: str, value: object, attributes: tuple[str, ...], maker: str) -> None:
    """Raise unless ``value`` has the attributes of the result of a metric."""
    if not all(hasattr(value, attribute) for attribute in attributes):
        raise TypeError(f"{name}: expected {maker}, but got {type(value).__name__}")


def as_array(name: str, value: object, dims: int) -> Array:
    """Return a tensor on any device as a float64 array."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, but got {type(value).__name__}")
    if value.dim() != dims:
        raise ValueError(
            f"{name}: expected a tensor with {dims} dimensions, but got shape {list(value.shape)}"
        )
    array: Array = value.detach().cpu().double().numpy()
    return array


def percent(share: float) -> str:
    """Format a share with two significant digits. A tiny share becomes ``<`` and a limit."""
    if share == 0 or share >= 0.9995:
        return f"{100 * share:.0f} %"
    if share < 1e-5:
        return "< 0.001 %"
    return f"{100 * share:.2g} %" if share < 0.0995 else f"{100 * share:.1f} %"
