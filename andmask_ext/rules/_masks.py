"""Rules with a mask: the update is zero or small where the environments disagree."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields

from torch import Tensor

from .. import ops
from .._checks import check_bool, check_number
from .._vote_test import (
    LEVELS,
    VoteTest,
    check_environments,
    given_levels,
    vote_test,
    warn_of_level,
)
from ._base import Rule


@dataclass(frozen=True, repr=False)
class Tested(Rule):
    """A rule with a test of votes. Subclasses have the fields tau and perhaps rescale first."""

    fdr: float | None = field(default=None, kw_only=True)
    significance: float | None = field(default=None, kw_only=True)
    zeros: str = field(default="count", kw_only=True)

    def __post_init__(self) -> None:
        test = vote_test(self.tau, self.fdr, self.significance, self.zeros)  # type: ignore[attr-defined]
        check_bool("rescale", self.rescale)
        object.__setattr__(self, test.name, test.level)
        if test.abstain and self.moments is not None:
            object.__setattr__(self, "moments", (*self.moments, "voters"))

    def __repr__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        levels = {name: value for name, value in shown.items() if name in LEVELS}
        rest = {
            name: value
            for name, value in shown.items()
            if name not in LEVELS and (name, value) != ("zeros", "count")
        }
        options = {**given_levels(levels), **rest}
        listed = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{type(self).__name__}({listed})"

    @property
    def test(self) -> VoteTest:
        """The test that decides which coordinates are kept."""
        return vote_test(self.tau, self.fdr, self.significance, self.zeros)  # type: ignore[attr-defined]

    @property
    def arguments(self) -> list[float]:
        test = self.test
        further = [] if test.is_plain else [float(test.criterion), float(test.abstain)]
        return [test.level, *self._own_arguments, *further]

    @property
    def _own_arguments(self) -> list[float]:
        return []

    def _check_environments(self, environments: int) -> None:
        check_environments(self.test, environments)

    def _warn_of(self, environments: int, owner: object = None) -> None:
        warn_of_level(self.test, environments, owner)


@dataclass(frozen=True, repr=False)
class AndMask(Tested):
    r"""Keep a coordinate of the mean gradient only where the environments agree in sign.

    .. math:: \mathbb{1}[|\sum_e \mathrm{sign}(g_e)| \ge \tau d] \cdot \bar g

    Instead of ``tau``, the threshold can follow from the chance that noise reaches it. If the
    gradients of a coordinate are noise around zero, every sign is fair, so
    :math:`p(k) = P(|2B - d| \ge k)`, :math:`B \sim \mathrm{Bin}(d, 1/2)`, is the chance of k net
    votes or more. The test is exact; coordinates of a layer depend on each other, so ``fdr`` bounds
    the share of noise for independent or positively dependent ones, and is a guide elsewhere.

    Args:
        tau: agreement threshold in [0, 1]. A coordinate is kept iff the absolute sum of signs is at
            least ``tau`` times the number of environments. 0 averages, 1 asks for unanimity.
        rescale: divide each parameter's update by the share of its coordinates that are kept.
        fdr: false discovery rate q in (0, 1), the expected share of noise among the coordinates
            that are kept. For each parameter of n coordinates, the threshold is the least k with
            :math:`n\,p(k) \le q\,h(k)`, where h(k) > 0 is the number of coordinates with at least k
            net votes. If there is none, the parameter is masked whole.
        significance: chance :math:`\alpha` in (0, 1) with which noise is kept. The threshold is the
            least k with :math:`p(k) \le \alpha`. If even unanimity is not so rare, because
            :math:`2^{1-d} > \alpha`, unanimity is asked for, with a warning.
        zeros: ``"count"``: an environment whose gradient is exactly 0 does not agree.
            ``"abstain"``: it does not vote. Then d is, for each coordinate, the number of signs
            that are not zero. A coordinate without votes is masked unless ``tau`` is 0. With
            ``fdr``, n counts the coordinates whose votes could be enough if all agreed, and there
            can be at most 1024 environments.

    Example:
        >>> import torch, andmask_ext
        >>> rule = andmask_ext.AndMask(tau=1.0)
        >>> rule
        AndMask(tau=1.0, rescale=False)
        >>> rule(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        tensor([2., 0.])
        >>> noise = torch.randn(32, 1000, generator=torch.Generator().manual_seed(0))
        >>> signal = torch.cat([torch.ones(32, 10), noise], dim=1)  # 10 of 1010 coordinates agree
        >>> int((andmask_ext.AndMask(fdr=0.05)(signal) != 0).sum())
        10

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3;
        Benjamini and Hochberg, *Controlling the false discovery rate*, J. R. Statist. Soc. B 1995.
    """

    tau: float | None = None
    rescale: bool = False

    name = "and_mask"
    moments = ("votes",)

    def __call__(self, grads: Tensor) -> Tensor:
        """Aggregate stacked gradients ``[d, *shape]``; see :func:`andmask_ext.ops.masked_mean`.

        Dimension 0 is that of the environments: a vector holds d gradients of one element.
        """
        return ops.masked_mean(
            grads,
            self.tau,
            self.rescale,
            fdr=self.fdr,
            significance=self.significance,
            zeros=self.zeros,
        )


@dataclass(frozen=True, repr=False)
class GeometricMean(Tested):
    r"""The AND-mask on the geometric mean of magnitudes, with the sign of the mean.

    .. math:: \mathbb{1}[|\sum_e \mathrm{sign}(g_e)| \ge \tau d] \cdot \mathrm{sign}(\bar g)
        \exp\left(\tfrac1d \sum_e \log(|g_e| + 10^{-10})\right)

    One environment with a small gradient is enough to make the update small. The authors found this
    rule better than :class:`AndMask` for noisy gradients and few environments.

    Args:
        tau: agreement threshold in [0, 1], as for :class:`AndMask`.
        rescale: divide each parameter's update by the share of its coordinates that are kept.
        fdr: false discovery rate, instead of ``tau``: see :class:`AndMask`.
        significance: level of significance, instead of ``tau``: see :class:`AndMask`.
        zeros: ``"count"`` or ``"abstain"``: see :class:`AndMask`.

    Example:
        >>> import torch, andmask_ext
        >>> andmask_ext.rules.GeometricMean(1.0)(torch.tensor([[1.0, -2.0], [4.0, -8.0]]))
        tensor([ 2., -4.])

    Reference:
        ``geom_mean`` in the code released with Parascandolo et al., *Learning explanations that are
        hard to vary*, ICLR 2021.
    """

    tau: float | None = None
    rescale: bool = False

    name = "geometric_mean"
    moments = ("votes", "logs")


@dataclass(frozen=True, repr=False)
class SandMask(Tested):
    r"""The smoothed AND-mask: a soft mask that is larger where magnitudes vary less.

    .. math:: m \cdot \bar g \Big/ \overline{m}, \quad
        m = \max\left(0, \tanh\frac{k (A - \tau)}{\mathrm{Var}_e\, g_e}\right), \quad
        A = \left|\tfrac1d \sum_e \mathrm{sign}(g_e)\right|

    The variance is unbiased. A NaN in the variance or in m becomes 1e-17, as in the authors' code.
    The mask depends on the scale of the gradients: smaller gradients give a sharper mask. With
    ``fdr`` or ``significance``, tau is the last agreement that :class:`AndMask` would not keep, so
    both keep the same coordinates.

    Args:
        tau: agreement threshold in [0, 1). 1 is allowed, but then the mask is 0 everywhere, and the
            constructor warns.
        k: sharpness, positive.
        rescale: divide each parameter's update by the mean of its mask.
        fdr: false discovery rate, instead of ``tau``: see :class:`AndMask`.
        significance: level of significance, instead of ``tau``: see :class:`AndMask`.
        zeros: ``"count"`` or ``"abstain"``: see :class:`AndMask`.

    Example:
        >>> import torch, andmask_ext
        >>> rule = andmask_ext.rules.SandMask(tau=0.5, rescale=False)
        >>> rule(torch.tensor([[1.0, -2.0], [1.5, 4.0]]))
        tensor([1.2500, 0.0000])

    Reference:
        Shahtalebi et al., *SAND-mask: an enhanced gradient masking strategy for the discovery of
        invariances in domain generalization*, 2021, arXiv 2106.02266.
    """

    tau: float | None = None
    k: float = 10.0
    rescale: bool = True

    name = "sand_mask"
    moments = ("votes", "squares")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("k", self.k, "a positive finite number", lambda k: 0 < k < float("inf"))
        object.__setattr__(self, "k", float(self.k))
        if self.tau == 1.0:
            warnings.warn(
                "SandMask(tau=1.0) masks everything: no agreement is beyond 1", stacklevel=3
            )

    @property
    def _own_arguments(self) -> list[float]:
        return [self.k]


@dataclass(frozen=True, repr=False)
class MaskedAverage(Tested):
    r"""Gradient masked averaging: low agreement multiplies the mean instead of masking it.

    .. math:: \bar g \cdot \begin{cases} 1 & A \ge \tau \\ A & \text{else} \end{cases}, \quad
        A = \left|\tfrac1d \sum_e \mathrm{sign}(g_e)\right|

    Args:
        tau: agreement threshold in [0, 1]. 0 averages.
        fdr: false discovery rate, instead of ``tau``: see :class:`AndMask`.
        significance: level of significance, instead of ``tau``: see :class:`AndMask`.
        zeros: ``"count"`` or ``"abstain"``: see :class:`AndMask`.

    Example:
        >>> import torch, andmask_ext
        >>> grads = torch.tensor([[1.0, -1.0], [1.0, 1.0], [1.0, 3.0]])
        >>> andmask_ext.rules.MaskedAverage(tau=1.0)(grads)
        tensor([1.0000, 0.3333])

    Reference:
        Tenison et al., *Gradient masked averaging for federated learning*, 2022, arXiv 2201.11986.
    """

    tau: float | None = None

    name = "masked_average"
    moments = ("votes",)


@dataclass(frozen=True, repr=False)
class FedILC(Tested):
    r"""The AND-mask on geometric means of the positive and of the negative gradients.

    .. math:: \mathbb{1}[|\sum_e \mathrm{sign}(g_e)| \ge \tau d] \left(
        \tfrac{n_+}{d} \mathrm{GM}(g_e > 0) - \tfrac{n_-}{d} \mathrm{GM}(|g_e| : g_e < 0)\right)

    GM is the geometric mean and :math:`n_\pm` the number of its gradients. GM of none is 0.

    Args:
        tau: agreement threshold in [0, 1], as for :class:`AndMask`.
        fdr: false discovery rate, instead of ``tau``: see :class:`AndMask`.
        significance: level of significance, instead of ``tau``: see :class:`AndMask`.
        zeros: ``"count"`` or ``"abstain"``: see :class:`AndMask`.

    Example:
        >>> import torch, andmask_ext
        >>> grads = torch.tensor([[1.0, 1.0], [4.0, 4.0], [2.0, -6.0]])
        >>> andmask_ext.rules.FedILC(tau=0.0)(grads)
        tensor([ 2.0000, -0.6667])

    Reference:
        Zhang et al., *FedILC: weighted geometric mean and invariant gradient covariance for
        federated learning on non-IID data*, 2022, arXiv 2205.09305.
    """

    tau: float | None = None

    name = "fed_ilc"

    def __call__(self, grads: Tensor) -> Tensor:
        """Aggregate stacked gradients; see :meth:`Rule.__call__`."""
        if self.test.is_plain:
            return super().__call__(grads)
        # The votes of a whole tensor are tested first; the means do not depend on the test.
        mask = ops.agreement_mask(
            grads, self.tau, fdr=self.fdr, significance=self.significance, zeros=self.zeros
        )
        means: Tensor = FedILC(tau=0.0)(grads)
        return means * mask.to(means.dtype)
