"""Synthetic memorization: two spirals to be learned, and a shortcut in every environment.

:mod:`.data` draws the data set, :mod:`.settings` says what a run is made of, :mod:`.networks` and
:mod:`.methods` are what is trained and how, :mod:`.training` trains. :mod:`.cli` is ``python -m
studies spirals``; its parts (:mod:`.compare`, :mod:`.search`, :mod:`.environments`) plan runs
and say what they come to; :mod:`.figures` and :mod:`.charts` draw.

Reference:
    Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 4.1.
"""

from .data import Spirals, SpiralsConfig, draw_mechanism, draw_spirals
from .networks import build_model
from .settings import PAPER, RELEASED, Settings
from .training import train

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
