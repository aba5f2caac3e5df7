"""The colours of every figure.

Okabe and Ito's palette, which colour-blind readers can tell apart. Where several curves share axes
their line styles differ too, for readers without any colour.
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
