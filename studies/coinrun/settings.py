"""What is tried: data, budgets, and the values that the search draws from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..search import draw
from .data import DataSettings, Levels

METHODS = {"adam": "Adam", "temporal": "temporal AND-mask Adam"}
REFERENCES = {"right up": "always right and up", "random": "any action"}

TRIAL_SEED = 100  # of all trials; the final runs have seeds of their own

# The first trial of each method is given: what one would take without a search, the paper's best.
FIRST: dict[str, dict[str, Any]] = {
    "adam": {"lr": 1e-3, "beta1": 0.9, "weight_decay": 1e-2, "decoupled": True},
    "temporal": {
        "lr": 0.0078,
        "beta1": 0.21,
        "beta3": 0.79,
        "tau": 0.36,
        "weight_decay": 0.057,
        "decoupled": True,
        "bias_correction": False,
    },
}
_SHARED: dict[str, list[Any]] = {
    "lr": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
    "beta1": [0.2, 0.5, 0.8, 0.9],
    "weight_decay": [1e-3, 1e-2, 3e-2, 1e-1],
    "decoupled": [True, False],
}
SPACES: dict[str, dict[str, list[Any]]] = {
    "adam": _SHARED,
    "temporal": _SHARED
    | {
        "beta3": [0.6, 0.8, 0.9],
        "tau": [0.1, 0.2, 0.35, 0.5],
        "bias_correction": [False, True],
    },
}


@dataclass(frozen=True)
class Size:
    """How much is done."""

    data: DataSettings
    trials: int
    epochs: int
    final_epochs: int
    batch: int
    width: int


FULL = Size(DataSettings(), trials=8, epochs=12, final_epochs=30, batch=32, width=16)
QUICK = Size(
    DataSettings(Levels(3, 4, 60, 80), Levels(1000, 2, 40, 80), Levels(2002, 4, 20, 80)),
    trials=2,
    epochs=4,
    final_epochs=40,
    batch=32,
    width=8,
)


def trials(method: str, count: int) -> list[dict[str, Any]]:
    """Return the settings that a method is tried with: the given one, then random ones."""
    return [FIRST[method], *draw(SPACES[method], count - 1, seed=0)] if count else []
