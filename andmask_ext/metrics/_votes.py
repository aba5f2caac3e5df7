"""Metrics of votes: the agreement of environments on the sign of each coordinate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .._checks import check_bool, check_count, check_tau
from ..rules._threshold import vote_threshold
from ._inputs import Gradients, Stacked, entries_of, stacked_of, without_none

__all__ = [
    "TauCurve",
    "VoteHistogram",
    "kept_fraction",
    "noise_kept_fraction",
    "noise_kept_probability",
    "noise_votes",
    "sign_agreement",
    "tau_curve",
    "vote_histogram",
]


def sign_agreement(grads: Gradients) -> Any:
    r"""Return how far the environments agree on the sign of each coordinate.

    .. math:: |\sum_e \mathrm{sign}(g_e)| / d

    It is 1 if all agree, and 0 if half of them point each way. The AND-mask keeps a coordinate if
    its agreement is at least tau. For noise the average is about :math:`\sqrt{2 / (\pi d)}`.

    Args:
        grads: gradients of d environments: a tensor ``[d, *shape]``, a dict or list of such tensors
            with one for each *parameter*, or :class:`andmask_ext.Moments` with votes. A list of one
            gradient per environment must be stacked before.

    Returns:
        One tensor ``[*shape]`` per parameter, float32, or float64 for float64 gradients. The form
        is that of ``grads``. For moments it is a list, with None for parameters without a gradient.

    Raises:
        TypeError: ``grads`` has the wrong form or dtype.
        ValueError: there is no environment, or moments keep no votes.

    Shape:
        - grads: :math:`(d, *)`
        - output: :math:`(*)`

    Example:
        >>> import torch, andmask_ext as am
        >>> am.metrics.sign_agreement(torch.tensor([[1.0, -2.0, 0.0], [3.0, 4.0, 5.0]]))
        tensor([1.0000, 0.0000, 0.5000])

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
    """
    entries = entries_of(grads)
    moments = entries.with_kinds("votes")
    return entries.like([
        votes.abs().to(total.dtype).div_(entries.environments)
        for votes, total in zip(without_none(moments.votes), without_none(moments.sum), strict=True)
    ])  # fmt: skip


def kept_fraction(grads: Gradients, tau: float, *, per_parameter: bool = False) -> Any:
    r"""Return the share of coordinates that the AND-mask keeps.

    Compare it with :func:`noise_kept_fraction`, the share that is kept if the signs are noise.

    Args:
        grads: as for :func:`sign_agreement`.
        tau: agreement threshold in [0, 1].
        per_parameter: return one share for each parameter instead of one for all coordinates.

    Returns:
        A 0-dim float64 tensor. With ``per_parameter``, one per parameter in the form of ``grads``.
        NaN if there are no coordinates.

    Raises:
        TypeError: ``grads`` has the wrong form or dtype, or ``tau`` is not a number.
        ValueError: there is no environment, moments keep no votes, or ``tau`` lies outside [0, 1].

    Example:
        >>> import torch, andmask_ext as am
        >>> grads = torch.tensor([[1.0, -2.0, 3.0, 5.0], [3.0, 4.0, 5.0, 1.0]])
        >>> am.metrics.kept_fraction(grads, tau=1.0)
        tensor(0.7500, dtype=torch.float64)

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
    """
    check_tau(tau)
    check_bool("per_parameter", per_parameter)
    entries = entries_of(grads)
    counts, _ = entries.histograms()
    if per_parameter:
        return entries.like(list(_kept(counts, tau).unbind()))
    return _kept(counts.sum(0), tau)


def noise_kept_probability(environments: int, tau: float) -> float:
    r"""Return the probability that the AND-mask keeps a coordinate of pure noise.

    This is the probability of :math:`|\mathrm{votes}| \ge \tau d` if signs are independent and
    fair, so that votes are binomial. It is exact up to rounding, and decays exponentially with d.
    A measured :func:`kept_fraction` is evidence of agreement only if it is clearly larger.

    Args:
        environments: the number d of environments, each with a gradient that is not zero. If some
            are zero, use :func:`noise_kept_fraction`.
        tau: agreement threshold in [0, 1].

    Returns:
        The probability, a float.

    Raises:
        TypeError: ``environments`` is not an int, or ``tau`` not a number.
        ValueError: ``environments`` is not positive, or ``tau`` lies outside [0, 1].

    Example:
        >>> import andmask_ext as am
        >>> [round(am.metrics.noise_kept_probability(d, 0.4), 5) for d in (4, 16, 80)]
        [0.625, 0.07681, 0.00045]

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021,
        proposition 2 (appendix A.3).
    """
    check_tau(tau)
    check_count("environments", environments, 1)
    return _noise_level(environments, vote_threshold(tau, environments))


def noise_kept_fraction(grads: Stacked, tau: float) -> Tensor:
    """Return the share of coordinates that the AND-mask would keep if all signs were noise.

    It is the expected share if the sign of each nonzero gradient were random.

    Environments whose gradient is exactly zero cast no vote but count in d. There are many of them
    next to a ReLU if each environment has one example. Noise is then kept far less often than
    :func:`noise_kept_probability` of d environments.

    Args:
        grads: stacked gradients of d environments: a tensor ``[d, *shape]``, or a dict or list of
            them.
        tau: agreement threshold in [0, 1].

    Returns:
        A 0-dim float64 tensor, NaN if there are no coordinates.

    Raises:
        TypeError: an argument has the wrong type. Moments are refused, as they do not tell which
            gradients are zero.
        ValueError: there is no environment, or ``tau`` lies outside [0, 1].

    Example:
        >>> import torch, andmask_ext as am
        >>> grads = torch.randn(16, 1000)
        >>> grads[:12] = 0
        >>> am.metrics.noise_kept_fraction(grads, 0.4)  # four votes are too few
        tensor(0., dtype=torch.float64)
    """
    check_tau(tau)
    if isinstance(grads, int):
        raise TypeError(
            "grads: expected stacked gradients, but got an int; for a number of environments use "
            "noise_kept_probability"
        )
    stacked = stacked_of(grads)
    count, device = len(stacked[0]), stacked[0].device
    voters = torch.zeros(count + 1, dtype=torch.int64, device=device)
    for param_grads in stacked:
        # The votes of the magnitudes are the number of nonzero gradients.
        voters += torch.ops.andmask.vote_histogram.default(param_grads.abs())[0].to(device)
    levels = torch.tensor(
        _noise_levels(count, vote_threshold(tau, count)), dtype=torch.float64, device=device
    )
    return (voters * levels).sum() / voters.sum()


def noise_votes(environments: int) -> Tensor:
    """Return the distribution of ``|votes|`` under pure noise: float64 ``[environments + 1]``.

    Args:
        environments: the number d of environments.

    Returns:
        The probability of each ``|votes|`` from 0 to d, float64 ``[d + 1]``.

    Raises:
        TypeError: ``environments`` is not an int.
        ValueError: ``environments`` is not positive.

    Example:
        >>> import andmask_ext as am
        >>> am.metrics.noise_votes(4)
        tensor([0.3750, 0.0000, 0.5000, 0.0000, 0.1250], dtype=torch.float64)
    """
    check_count("environments", environments, 1)
    return torch.tensor(_noise(environments), dtype=torch.float64)


@dataclass(frozen=True, eq=False, repr=False)
class VoteHistogram:
    """The number of coordinates for each number of votes.

    Attributes:
        environments: the number d of environments.
        counts: the number of coordinates with ``|votes|`` = k, int64 ``[d + 1]``.
        squares: the squared norm of the mean gradient on these coordinates, float64 ``[d + 1]``.
    """

    environments: int
    counts: Tensor
    squares: Tensor

    def __repr__(self) -> str:
        coordinates = int(self.counts.sum())
        return f"VoteHistogram({self.environments} environments, {coordinates} coordinates)"

    @property
    def share(self) -> Tensor:
        """The counts as shares of all coordinates, float64 ``[d + 1]``."""
        return self.counts / self.counts.sum().double()

    @property
    def noise(self) -> Tensor:
        """The shares expected for pure noise without zeros, float64 ``[d + 1]``."""
        return torch.tensor(
            _noise(self.environments), dtype=torch.float64, device=self.counts.device
        )

    def kept_fraction(self, tau: float) -> Tensor:
        """Return the share of coordinates that the AND-mask keeps, a 0-dim float64 tensor."""
        check_tau(tau)
        return _kept(self.counts, tau)

    def tau_curve(self) -> TauCurve:
        """Return what the AND-mask keeps, for every threshold that differs from the others."""
        total = self.squares.sum()
        kept = _at_least(self.counts).double() / self.counts.sum()
        steps = torch.arange(self.environments + 1, dtype=torch.float64, device=self.counts.device)
        return TauCurve(
            tau=steps / self.environments,
            kept_fraction=kept,
            noise_kept_fraction=_at_least(self.noise),
            # The mask multiplies, so values that are not finite show even if masked.
            norm=(_at_least(self.squares) + total * 0).sqrt(),
        )


@dataclass(frozen=True, eq=False)
class TauCurve:
    """What the AND-mask keeps, as a function of its threshold. All are float64 ``[d + 1]``.

    All thresholds in ``(tau[k - 1], tau[k]]`` have the mask of ``tau[k]``.

    Attributes:
        tau: the thresholds 0, 1/d, ..., 1.
        kept_fraction: the share of coordinates that are kept.
        noise_kept_fraction: the share expected for pure noise.
        norm: the norm of the masked mean gradient.
    """

    tau: Tensor
    kept_fraction: Tensor
    noise_kept_fraction: Tensor
    norm: Tensor


def vote_histogram(grads: Gradients) -> VoteHistogram:
    """Count the coordinates of all parameters by ``|votes|``, in one pass.

    Args:
        grads: as for :func:`sign_agreement`.

    Raises:
        TypeError: ``grads`` has the wrong form or dtype.
        ValueError: there is no environment, or moments keep no votes.

    Example:
        >>> import torch, andmask_ext as am
        >>> grads = torch.tensor([[1.0, -2.0, 3.0], [3.0, 4.0, 5.0]])
        >>> am.metrics.vote_histogram(grads).counts
        tensor([1, 0, 2])
    """
    entries = entries_of(grads)
    counts, squares = entries.histograms()
    return VoteHistogram(
        entries.environments, counts.sum(0), squares.sum(0) / entries.environments**2
    )


def tau_curve(grads: Gradients) -> TauCurve:
    r"""Return the share of kept coordinates and the norm of the masked mean for *every* tau.

    The curve is a function of the histogram of votes, so one pass over the gradients is enough.

    Args:
        grads: as for :func:`sign_agreement`.

    Raises:
        TypeError: ``grads`` has the wrong form or dtype.
        ValueError: there is no environment, or moments keep no votes.

    Example:
        >>> import torch, andmask_ext as am
        >>> curve = am.metrics.tau_curve(torch.tensor([[1.0, -2.0, 3.0], [3.0, 4.0, 5.0]]))
        >>> curve.tau
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
        >>> curve.kept_fraction
        tensor([1.0000, 0.6667, 0.6667], dtype=torch.float64)
        >>> curve.norm
        tensor([4.5826, 4.4721, 4.4721], dtype=torch.float64)

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
    """
    return vote_histogram(grads).tau_curve()


# ---- helpers ----


def _at_least(values: Tensor) -> Tensor:
    """Return the sum over k, k + 1, ... for each k, along the last dimension."""
    return values.flip(-1).cumsum(-1).flip(-1)


def _kept(counts: Tensor, tau: float) -> Tensor:
    """Return the shares of kept coordinates, given counts ``[..., d + 1]``."""
    threshold = vote_threshold(tau, counts.shape[-1] - 1)
    return counts[..., threshold:].sum(-1) / counts.sum(-1).double()


def _noise_level(environments: int, threshold: int) -> float:
    return math.fsum(_noise(environments)[threshold:])


@lru_cache(maxsize=64)
def _noise_levels(environments: int, threshold: int) -> list[float]:
    """Return the noise level for 0, 1, ..., d voters. Do not change the list: it is cached."""
    return [
        _noise_level(voters, threshold) if voters else float(threshold == 0)
        for voters in range(environments + 1)
    ]


@lru_cache(maxsize=16)
def _noise(environments: int) -> list[float]:
    """Return the distribution of ``|votes|``. Do not change the list: it is cached.

    It starts at the most probable number of votes. Each further probability is the last one times a
    factor, so no factorial is needed. In the end all are divided by their sum. The cache holds
    numbers, not a tensor, so it does not depend on the device or mode of the first call.
    """
    probabilities = [0.0] * (environments + 1)
    share = 1.0
    for plus in range((environments + 1) // 2, environments + 1):
        votes = 2 * plus - environments
        probabilities[votes] = share if votes == 0 else 2 * share  # two ways to get there
        share *= (environments - plus) / (plus + 1)  # C(d, plus + 1) / C(d, plus)
    total = math.fsum(probabilities)
    return [probability / total for probability in probabilities]
