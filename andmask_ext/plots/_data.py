"""What the figures read of the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor


class Votes(Protocol):
    """A histogram of votes, as of :func:`andmask_ext.metrics.vote_histogram`."""

    @property
    def environments(self) -> int:
        """Their number d."""

    @property
    def counts(self) -> Tensor:
        """Number of coordinates with ``|votes|`` = k, ``[d + 1]``."""

    @property
    def noise(self) -> Tensor:
        """Shares expected of pure noise, ``[d + 1]``."""


class Curve(Protocol):
    """What the AND-mask keeps over its threshold, as of :func:`andmask_ext.metrics.tau_curve`."""

    @property
    def tau(self) -> Tensor:
        """0, 1/d, ..., 1."""

    @property
    def kept_fraction(self) -> Tensor:
        """Share of kept coordinates, ``[d + 1]``."""

    @property
    def noise_kept_fraction(self) -> Tensor:
        """The same of pure noise, ``[d + 1]``."""

    @property
    def norm(self) -> Tensor:
        """Norm of the masked mean gradient, ``[d + 1]``."""


class Records(Protocol):
    """Metrics per parameter over training steps, as of :class:`andmask_ext.metrics.Monitor`."""

    @property
    def steps(self) -> Sequence[int]:
        """The recorded steps, increasing."""

    @property
    def names(self) -> Sequence[str]:
        """The parameters, in the model's order."""

    def series(self, metric: str) -> Tensor:
        """Return a metric's values, ``[records, parameters]``."""


class Correlations(Protocol):
    """Correlations with signals, as of :func:`andmask_ext.metrics.gradient_correlation`."""

    @property
    def tau(self) -> Tensor:
        """Thresholds, ``[t]``."""

    @property
    def correlations(self) -> Mapping[str, Tensor]:
        """For each signal, ``[t]``."""
