"""Random search: which settings to try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sklearn.model_selection import ParameterSampler

Space = Mapping[str, Sequence[Any]]


def draw(space: Space | Sequence[Space], trials: int, seed: int) -> list[dict[str, Any]]:
    """Draw settings without repetition, by scikit-learn's ``ParameterSampler``.

    The draws depend on ``seed`` alone, so that a search that was interrupted goes on with the same
    ones, and methods that have options in common are tried with the same budget.

    Args:
        space: for each name the values that it may have; or several such spaces, for choices that
            exclude each other.
        trials: how many; fewer are returned where the space has fewer.
        seed: decides the draws.

    Returns:
        A dict of values for each trial.

    Example:
        >>> draw({"lr": [0.1, 0.01], "batch": [64]}, trials=9, seed=0)
        [{'lr': 0.1, 'batch': 64}, {'lr': 0.01, 'batch': 64}]
    """
    spaces = [space] if isinstance(space, Mapping) else list(space)
    most = sum(_size(one) for one in spaces)
    return [dict(one) for one in ParameterSampler(spaces, min(trials, most), random_state=seed)]


def _size(space: Space) -> int:
    size = 1
    for values in space.values():
        size *= len(values)
    return size
