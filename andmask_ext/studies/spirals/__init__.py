"""Synthetic memorization: two spirals to be learned, and a shortcut in every environment.

:mod:`.data` draws the data set, :mod:`.settings` says what a run is made of, :mod:`.training`
trains, :mod:`.figures` draws, and :mod:`.cli` is ``python -m andmask_ext spirals``.

Reference:
    Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 4.1.
"""

from .data import Spirals, SpiralsConfig, draw_mechanism, draw_spirals
from .settings import PAPER, RELEASED, Settings
from .training import build_model, train

__all__ = [
    "PAPER",
    "RELEASED",
    "Settings",
    "Spirals",
    "SpiralsConfig",
    "build_model",
    "draw_mechanism",
    "draw_spirals",
    "train",
]
