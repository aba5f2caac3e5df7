"""Figures of metrics; needs matplotlib: ``pip install andmask_ext[plots]``.

Every function takes matplotlib axes as ``ax``, or opens a figure that fits a README, and returns
the axes: one, or a list of them where there are several panels (the figure is ``axes.figure``, or
``axes[0].figure``). Nothing is shown or saved, and matplotlib's settings are left as they were.
``palette`` and ``style`` hold the colours and the look, for figures of your own.
"""

try:
    import matplotlib as _matplotlib  # noqa: F401  # only to tell what is missing
except ImportError as error:
    raise ImportError(
        "andmask_ext.plots needs matplotlib: pip install 'andmask_ext[plots]'"
    ) from error

from . import palette, style
from ._correlations import gradient_correlation, gradient_cosines
from ._monitor import kept_fraction
from ._votes import tau_curve, vote_histogram

__all__ = [
    "gradient_correlation",
    "gradient_cosines",
    "kept_fraction",
    "palette",
    "style",
    "tau_curve",
    "vote_histogram",
]
