"""Random search: which settings to try."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sklearn.model_selection import ParameterSampler


def draw(space: Mapping[str, Sequence[Any]], trials: int, seed: int) -> list[dict[str, Any]]:
    """Draw settings without repetition, by scikit-learn's ``ParameterSampler``.

    The draws depend on ``seed`` alone, so that a search that was interrupted goes on with the same
    ones, and methods that have options in common are tried with the same budget. Fewer than
    ``trials`` come where the space has fewer.

    Example:
        >>> draw({"lr": [0.1, 0.01], "batch": [64]}, trials=9, seed=0)
        [{'lr': 0.1, 'batch': 64}, {'lr': 0.01, 'batch': 64}]
    """
    most = math.prod(map(len, space.values()))
    sampler = ParameterSampler([dict(space)], min(trials, most), random_state=seed)
    return [dict(settings) for settings in sampler]
