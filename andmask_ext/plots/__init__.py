"""Figures of metrics. They need matplotlib: ``pip install matplotlib``.

Every function draws into matplotlib axes ``ax``, or opens a figure that fits a README. It returns
the axes; the figure is ``axes.figure``. Nothing is shown or saved, and matplotlib's settings do not
change. ``palette`` and ``style`` hold the colours and the look, which other figures can use too.
"""

try:
    import matplotlib as _matplotlib  # noqa: F401  # only to report that it is missing
except ImportError as error:
    raise ImportError("andmask_ext.plots needs matplotlib: `pip install matplotlib`") from error

from . import palette, style
from ._correlations import gradient_correlation, gradient_cosines
from ._inputs import input_agreement
from ._monitor import kept_fraction
from ._votes import masked_norm, tau_curve, vote_histogram

__all__ = [
    "gradient_correlation",
    "gradient_cosines",
    "input_agreement",
    "kept_fraction",
    "masked_norm",
    "palette",
    "style",
    "tau_curve",
    "vote_histogram",
]
