"""The attributes of metrics that the figures read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor


class Votes(Protocol):
    """The result of :func:`andmask_ext.metrics.vote_histogram`."""

    @property
    def environments(self) -> int:
        """The number d of environments."""

    @property
    def counts(self) -> Tensor:
        """Number of coordinates with ``|votes|`` = k, ``[d + 1]``."""

    @property
    def noise(self) -> Tensor:
        """Shares expected for pure noise, ``[d + 1]``."""


class Curve(Protocol):
    """The result of :func:`andmask_ext.metrics.tau_curve`."""

    @property
    def tau(self) -> Tensor:
        """The thresholds 0, 1/d, ..., 1."""

    @property
    def kept_fraction(self) -> Tensor:
        """Share of kept coordinates, ``[d + 1]``."""

    @property
    def noise_kept_fraction(self) -> Tensor:
        """Share of kept coordinates expected for pure noise, ``[d + 1]``."""

    @property
    def norm(self) -> Tensor:
        """Norm of the masked mean gradient, ``[d + 1]``."""


class Records(Protocol):
    """Metrics per parameter and training step, as in :class:`andmask_ext.metrics.Monitor`."""

    @property
    def steps(self) -> Sequence[int]:
        """The recorded steps, increasing."""

    @property
    def names(self) -> Sequence[str]:
        """The parameters, in the model's order."""

    def series(self, metric: str) -> Tensor:
        """Return the values of a metric, ``[records, parameters]``."""


class Correlations(Protocol):
    """The result of :func:`andmask_ext.metrics.gradient_correlation`."""

    @property
    def tau(self) -> Tensor:
        """Thresholds, ``[t]``."""

    @property
    def correlations(self) -> Mapping[str, Tensor]:
        """Correlations with each signal, ``[t]``."""


class ByInput(Protocol):
    """The result of :func:`andmask_ext.metrics.input_agreement`."""

    @property
    def share(self) -> Tensor:
        """Share of kept coordinates of each input."""

    @property
    def noise(self) -> Tensor:
        """Share of kept coordinates expected for noise."""

    @property
    def own(self) -> Tensor:
        """Share of the gradient that is an environment's own."""

    @property
    def tau(self) -> float:
        """The threshold."""

    @property
    def kind(self) -> str:
        """What an input is: "tokens", "pixels" or "features"."""
