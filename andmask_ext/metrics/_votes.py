"""Metrics of votes: how many environments agree on the sign of each coordinate."""

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

    1: all agree; 0: as many point one way as the other. The AND-mask keeps a coordinate where this
    is at least tau. Of noise it is about :math:`\sqrt{2 / (\pi d)}` on average.

    Args:
        grads: gradients of d environments: a tensor ``[d, *shape]``, a dict or list of them, or
            :class:`andmask_ext.Moments` with votes.

    Returns:
        One tensor ``[*shape]`` for each parameter, in the form in which gradients came (of moments
        a list, with None for untouched parameters); float32, float64 for float64 gradients.

    Raises:
        TypeError: ``grads`` has another form or dtype.
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

    Compare it with :func:`noise_kept_fraction`: what is kept if the signs are noise.

    Args:
        grads: as for :func:`sign_agreement`.
        tau: agreement threshold in [0, 1].
        per_parameter: return one share for each parameter instead of one for all coordinates.

    Returns:
        A 0-dim float64 tensor; or 0-dim tensors in the form in which gradients came. NaN where
        there are no coordinates.

    Raises:
        TypeError: ``grads`` has another form or dtype, or ``tau`` is not a number.
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

    Signs that are independent and fair make votes binomial: the chance that
    :math:`|\mathrm{votes}| \ge \tau d`. Exact up to rounding. A measured :func:`kept_fraction` has
    to stand out from this level; it decays exponentially with the environments.

    Args:
        environments: their number d, each with a gradient that is not zero. Where some are zero,
            see :func:`noise_kept_fraction`.
        tau: agreement threshold in [0, 1].

    Raises:
        TypeError: ``environments`` is not an int, or ``tau`` not a number.
        ValueError: ``environments`` is not positive, or ``tau`` lies outside [0, 1].

    Example:
        >>> import andmask_ext as am
        >>> [round(am.metrics.noise_kept_probability(d, 0.4), 5) for d in (4, 16, 80)]
        [0.625, 0.07681, 0.00045]

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021,
        proposition 2 (appendix A.3), of which this is the probability.
    """
    check_tau(tau)
    check_count("environments", environments, 1)
    return _noise_level(environments, vote_threshold(tau, environments))


def noise_kept_fraction(grads: Stacked, tau: float) -> Tensor:
    """Return the share of coordinates that the AND-mask would keep if all signs were noise.

    It is the average if the sign of each gradient that is not zero were drawn anew.

    Environments whose gradient is exactly zero cast no vote but count in d. Where there are many,
    as in a layer before or after a ReLU with one example in each environment, noise is kept far
    less often than :func:`noise_kept_probability` of d environments says.

    Args:
        grads: stacked gradients of d environments: a tensor ``[d, *shape]``, or a dict or list of
            them.
        tau: agreement threshold in [0, 1].

    Returns:
        A 0-dim float64 tensor, NaN where there are no coordinates.

    Raises:
        TypeError: an argument has another type; moments do not know which gradients are zero.
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
        # Those that are not zero agree on the sign of their magnitude.
        voters += torch.ops.andmask.vote_histogram.default(param_grads.abs())[0].to(device)
    levels = torch.tensor(
        _noise_levels(count, vote_threshold(tau, count)), dtype=torch.float64, device=device
    )
    return (voters * levels).sum() / voters.sum()


def noise_votes(environments: int) -> Tensor:
    """Return the distribution of ``|votes|`` under pure noise: float64 ``[environments + 1]``.

    Args:
        environments: their number d.

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
    """How many coordinates have how many votes.

    Attributes:
        environments: their number d.
        counts: int64 ``[d + 1]``, of coordinates with ``|votes|`` = k.
        squares: float64 ``[d + 1]``, the squared norm of the mean gradient on these coordinates.
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
        """The shares expected of pure noise without zeros, float64 ``[d + 1]``."""
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
            # The mask multiplies: what is not finite shows under it too.
            norm=(_at_least(self.squares) + total * 0).sqrt(),
        )


@dataclass(frozen=True, eq=False)
class TauCurve:
    """What the AND-mask keeps, over its threshold. All float64 ``[d + 1]``.

    The mask of any threshold in ``(tau[k - 1], tau[k]]`` is that of ``tau[k]``.

    Attributes:
        tau: 0, 1/d, ..., 1.
        kept_fraction: share of coordinates that are kept.
        noise_kept_fraction: the same of pure noise.
        norm: of the masked mean gradient.
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
        TypeError: ``grads`` has another form or dtype.
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

    One pass over the gradients gives the whole curve: it is a function of the histogram of votes.

    Args:
        grads: as for :func:`sign_agreement`.

    Raises:
        TypeError: ``grads`` has another form or dtype.
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
    """Return sums over k, k + 1, ..., along the last dimension."""
    return values.flip(-1).cumsum(-1).flip(-1)


def _kept(counts: Tensor, tau: float) -> Tensor:
    """Return the shares of kept coordinates, from counts ``[..., d + 1]``."""
    threshold = vote_threshold(tau, counts.shape[-1] - 1)
    return counts[..., threshold:].sum(-1) / counts.sum(-1).double()


def _noise_level(environments: int, threshold: int) -> float:
    return math.fsum(_noise(environments)[threshold:])


@lru_cache(maxsize=64)
def _noise_levels(environments: int, threshold: int) -> list[float]:
    """Return the level of 0, 1, ..., d voters; to be read only."""
    return [
        _noise_level(voters, threshold) if voters else float(threshold == 0)
        for voters in range(environments + 1)
    ]


@lru_cache(maxsize=16)
def _noise(environments: int) -> list[float]:
    """Return the distribution of ``|votes|``; to be read only.

    From the most probable number of votes outwards each probability follows from the one before
    by a factor, and in the end they are divided by their sum: no factorial is ever formed. Numbers,
    not a tensor: what is kept must not depend on the device or mode of its first use.
    """
    probabilities = [0.0] * (environments + 1)
    share = 1.0
    for plus in range((environments + 1) // 2, environments + 1):
        votes = 2 * plus - environments
        probabilities[votes] = share if votes == 0 else 2 * share  # two ways to get there
        share *= (environments - plus) / (plus + 1)  # C(d, plus + 1) / C(d, plus)
    total = math.fsum(probabilities)
    return [probability / total for probability in probabilities]
