"""The threshold of votes that a level asks for, and what it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .._vote_test import vote_test
from ..rules._kept import kept_by, noise_share
from ._inputs import Gradients, entries_of, without_none

__all__ = ["VoteThreshold", "vote_threshold"]


@dataclass(frozen=True, eq=False)
class VoteThreshold:
    """The threshold of the coordinates of one parameter.

    Attributes:
        environments: the number d of environments.
        votes: the least ``|votes|`` t that keep a coordinate, 0-dim int64, d + 1 if the parameter
            is masked whole. With zeros that abstain int64 ``[d + 1]``, by the number of gradients
            that are not zero.
        kept_fraction: the share of coordinates that are kept, 0-dim float64. NaN if there are none.
        noise_share: the estimated share of noise among them, 0-dim float64: the number that would
            be kept if all signs were noise, divided by the number that is kept, at most 1. NaN if
            nothing is kept.
    """

    environments: int
    votes: Tensor
    kept_fraction: Tensor
    noise_share: Tensor


def vote_threshold(
    grads: Gradients,
    tau: float | None = None,
    *,
    fdr: float | None = None,
    significance: float | None = None,
    zeros: str = "count",
) -> Any:
    r"""Return the threshold of votes of each parameter, and what it keeps.

    :math:`t` is the threshold of :class:`andmask_ext.AndMask` with the same arguments. If a
    coordinate is noise, it has t votes or more with probability :math:`p(t)`. So of n coordinates
    about :math:`n\,p(t)` are kept at most that are noise.

    Args:
        grads: as for :func:`sign_agreement`.
        tau: agreement threshold in [0, 1].
        fdr: false discovery rate in (0, 1), instead of ``tau``.
        significance: level of significance in (0, 1), instead of ``tau``.
        zeros: ``"count"``: a gradient of exactly 0 does not agree. ``"abstain"``: it does not vote.

    Returns:
        A :class:`VoteThreshold` for each parameter, in the form of ``grads``. For moments it is a
        list, with None for parameters without a gradient.

    Raises:
        TypeError: ``grads`` has the wrong form or dtype, or a level is not a number.
        ValueError: not exactly one level is given; a level lies outside its range; ``zeros`` is
            unknown; there is no environment; or moments keep no votes, or with ``"abstain"`` no
            voters.

    Example:
        >>> import torch, andmask_ext as am
        >>> noise = torch.randn(16, 1000, generator=torch.Generator().manual_seed(0))
        >>> grads = torch.cat([torch.ones(16, 100), noise], dim=1)  # 100 of 1100 are signal
        >>> found = am.metrics.vote_threshold(grads, fdr=0.05)
        >>> found.votes, found.kept_fraction, found.noise_share
        (tensor(11), tensor(0.0955, dtype=torch.float64), tensor(0.0438, dtype=torch.float64))

    Reference:
        Benjamini and Hochberg, *Controlling the false discovery rate*, J. R. Statist. Soc. B 1995.
    """
    test = vote_test(tau, fdr, significance, zeros)
    entries = entries_of(grads)
    moments = entries.with_kinds("votes", *(["voters"] if test.abstain else []))
    found = kept_by(test, moments)
    rows = found.thresholds if test.abstain else found.thresholds[:, 0]
    sizes = [votes.numel() for votes in without_none(moments.votes)]
    kept = [number.double() / size for number, size in zip(found.kept, sizes, strict=True)]
    shares = noise_share(found.noise, found.kept)
    return entries.like([
        VoteThreshold(entries.environments, *values)
        for values in zip(rows, kept, shares, strict=True)
    ])  # fmt: skip
