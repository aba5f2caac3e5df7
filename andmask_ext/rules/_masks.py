"""Rules with a mask: the update is zero or small where the environments disagree."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor

from .. import ops
from .._checks import check_bool, check_number, check_tau
from ._base import Rule


class _Tau(Rule):
    """A rule whose first argument is tau."""

    tau: float

    def __post_init__(self) -> None:
        check_tau(self.tau)
        check_bool("rescale", self.rescale)
        object.__setattr__(self, "tau", float(self.tau))

    @property
    def arguments(self) -> list[float]:
        return [self.tau]


@dataclass(frozen=True)
class AndMask(_Tau):
    r"""Keep a coordinate of the mean gradient only where the environments agree in sign.

    .. math:: \mathbb{1}[|\sum_e \mathrm{sign}(g_e)| \ge \tau d] \cdot \bar g

    Args:
        tau: agreement threshold in [0, 1]. A coordinate is kept iff the absolute sum of signs is at
            least ``tau`` times the number of environments. 0 averages, 1 asks for unanimity.
        rescale: divide each parameter's update by the share of its coordinates that are kept.

    Example:
        >>> import torch, andmask_ext
        >>> rule = andmask_ext.AndMask(tau=1.0)
        >>> rule
        AndMask(tau=1.0, rescale=False)
        >>> rule(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        tensor([2., 0.])

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
    """

    tau: float
    rescale: bool = False

    name = "and_mask"
    moments = ("votes",)

    def __call__(self, grads: Tensor) -> Tensor:
        """Aggregate stacked gradients ``[d, *shape]``; see :func:`andmask_ext.ops.masked_mean`.

        Dimension 0 is that of the environments: a vector holds d gradients of one element.
        """
        return ops.masked_mean(grads, self.tau, self.rescale)


@dataclass(frozen=True)
class GeometricMean(_Tau):
    r"""The AND-mask on the geometric mean of magnitudes, with the sign of the mean.

    .. math:: \mathbb{1}[|\sum_e \mathrm{sign}(g_e)| \ge \tau d] \cdot \mathrm{sign}(\bar g)
        \exp\left(\tfrac1d \sum_e \log(|g_e| + 10^{-10})\right)

    One environment with a small gradient is enough to make the update small. The authors found this
    rule better than :class:`AndMask` for noisy gradients and few environments.

    Args:
        tau: agreement threshold in [0, 1], as for :class:`AndMask`.
        rescale: divide each parameter's update by the share of its coordinates that are kept.

    Example:
        >>> import torch, andmask_ext
        >>> andmask_ext.rules.GeometricMean(1.0)(torch.tensor([[1.0, -2.0], [4.0, -8.0]]))
        tensor([ 2., -4.])

    Reference:
        ``geom_mean`` in the code released with Parascandolo et al., *Learning explanations that are
        hard to vary*, ICLR 2021.
    """

    tau: float
    rescale: bool = False

    name = "geometric_mean"
    moments = ("votes", "logs")


@dataclass(frozen=True)
class SandMask(_Tau):
    r"""The smoothed AND-mask: a soft mask that is larger where magnitudes vary less.

    .. math:: m \cdot \bar g \Big/ \overline{m}, \quad
        m = \max\left(0, \tanh\frac{k (A - \tau)}{\mathrm{Var}_e\, g_e}\right), \quad
        A = \left|\tfrac1d \sum_e \mathrm{sign}(g_e)\right|

    The variance is unbiased. A NaN in the variance or in m becomes 1e-17, as in the authors' code.
    The mask depends on the scale of the gradients: smaller gradients give a sharper mask.

    Args:
        tau: agreement threshold in [0, 1). 1 is allowed, but then the mask is 0 everywhere, and the
            constructor warns.
        k: sharpness, positive.
        rescale: divide each parameter's update by the mean of its mask.

    Example:
        >>> import torch, andmask_ext
        >>> rule = andmask_ext.rules.SandMask(tau=0.5, rescale=False)
        >>> rule(torch.tensor([[1.0, -2.0], [1.5, 4.0]]))
        tensor([1.2500, 0.0000])

    Reference:
        Shahtalebi et al., *SAND-mask: an enhanced gradient masking strategy for the discovery of
        invariances in domain generalization*, 2021, arXiv 2106.02266.
    """

    tau: float
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
    def arguments(self) -> list[float]:
        return [self.tau, self.k]


@dataclass(frozen=True)
class MaskedAverage(_Tau):
    r"""Gradient masked averaging: low agreement multiplies the mean instead of masking it.

    .. math:: \bar g \cdot \begin{cases} 1 & A \ge \tau \\ A & \text{else} \end{cases}, \quad
        A = \left|\tfrac1d \sum_e \mathrm{sign}(g_e)\right|

    Args:
        tau: agreement threshold in [0, 1]. 0 averages.

    Example:
        >>> import torch, andmask_ext
        >>> grads = torch.tensor([[1.0, -1.0], [1.0, 1.0], [1.0, 3.0]])
        >>> andmask_ext.rules.MaskedAverage(tau=1.0)(grads)
        tensor([1.0000, 0.3333])

    Reference:
        Tenison et al., *Gradient masked averaging for federated learning*, 2022, arXiv 2201.11986.
    """

    tau: float

    name = "masked_average"
    moments = ("votes",)


@dataclass(frozen=True)
class FedILC(_Tau):
    r"""The AND-mask on geometric means of the positive and of the negative gradients.

    .. math:: \mathbb{1}[|\sum_e \mathrm{sign}(g_e)| \ge \tau d] \left(
        \tfrac{n_+}{d} \mathrm{GM}(g_e > 0) - \tfrac{n_-}{d} \mathrm{GM}(|g_e| : g_e < 0)\right)

    GM is the geometric mean and :math:`n_\pm` the number of its gradients. GM of none is 0.

    Args:
        tau: agreement threshold in [0, 1], as for :class:`AndMask`.

    Example:
        >>> import torch, andmask_ext
        >>> grads = torch.tensor([[1.0, 1.0], [4.0, 4.0], [2.0, -6.0]])
        >>> andmask_ext.rules.FedILC(tau=0.0)(grads)
        tensor([ 2.0000, -0.6667])

    Reference:
        Zhang et al., *FedILC: weighted geometric mean and invariant gradient covariance for
        federated learning on non-IID data*, 2022, arXiv 2205.09305.
    """

    tau: float

    name = "fed_ilc"
