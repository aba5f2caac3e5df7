"""The colours of every figure.

This is the palette of Okabe and Ito, which colour-blind readers can distinguish. Curves that share
axes also differ in line style, for readers without colour.
"""

from __future__ import annotations

from typing import Final

__all__ = ["BLACK", "BLUE", "GREEN", "GREY", "ORANGE", "PURPLE", "SKY", "VERMILION"]

BLUE: Final = "#0072B2"
VERMILION: Final = "#D55E00"
GREEN: Final = "#009E73"
ORANGE: Final = "#E69F00"
PURPLE: Final = "#CC79A7"
SKY: Final = "#56B4E9"
BLACK: Final = "#222222"
GREY: Final = "#666666"
