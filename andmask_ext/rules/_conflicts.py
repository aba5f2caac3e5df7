"""Rules for conflicting gradients that sum instead of average. Two of them are random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._dtypes import wide_dtype
from ._base import Rule


@dataclass(frozen=True)
class AgreementSum(Rule):
    r"""The sum of the gradients where all environments agree in sign, else 0.

    .. math:: \mathbb{1}[|\sum_e \mathrm{sign}(g_e)| = d] \cdot \sum_e g_e

    This is :class:`AndMask` with ``tau=1`` times the number of environments.

    Example:
        >>> import torch, andmask_ext
        >>> andmask_ext.rules.AgreementSum()(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        tensor([4., 0.])

    Reference:
        Agr-Sum in Mansilla et al., *Domain generalization via gradient surgery*, ICCV 2021.
    """

    name = "agreement_sum"
    moments = ("votes",)


@dataclass(frozen=True)
class AgreementRandom(Rule):
    r"""The sum of the gradients where all environments agree in sign, else normal noise.

    The standard deviation of a parameter's noise is the mean of :math:`|\sum_e g_e|` over the
    coordinates that agree, and 0 if none agree. The noise comes from torch's global generator.

    Example:
        >>> import torch, andmask_ext
        >>> _ = torch.manual_seed(0)
        >>> andmask_ext.rules.AgreementRandom()(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        tensor([ 4.0000, -1.1737])

    Reference:
        Agr-Rand in Mansilla et al., *Domain generalization via gradient surgery*, ICCV 2021.
    """

    name = "agreement_random"

    def _noise(self, grads: Tensor) -> Tensor:
        return torch.randn(grads.shape[1:], dtype=wide_dtype(grads), device=grads.device)


@dataclass(frozen=True)
class SignDropout(Rule):
    r"""GradDrop: keep the gradients of one sign, drawn in proportion to its share.

    .. math:: \sum_e g_e \left(\mathbb{1}[P > U] \mathbb{1}[g_e > 0] +
        \mathbb{1}[P < U] \mathbb{1}[g_e < 0]\right), \quad
        P = \tfrac12 \left(1 + \frac{\sum_e g_e}{\sum_e |g_e|}\right)

    U is uniform in [0, 1) and is drawn for each coordinate from torch's global generator.

    Example:
        >>> import torch, andmask_ext
        >>> _ = torch.manual_seed(0)
        >>> andmask_ext.rules.SignDropout()(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        tensor([ 4., -2.])

    Reference:
        Chen et al., *Just pick a sign: optimizing deep multitask models with gradient sign
        dropout*, NeurIPS 2020.
    """

    name = "sign_dropout"

    def _noise(self, grads: Tensor) -> Tensor:
        return torch.rand(grads.shape[1:], dtype=wide_dtype(grads), device=grads.device)
