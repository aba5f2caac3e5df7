"""Metrics of the spread of gradients of environments around their mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_bool
from .._dtypes import wide_dtype
from .._norms import squared_norm
from ..moments import Moments
from ._inputs import Entries, Gradients, entries_of, without_none

__all__ = ["coherence", "signal_to_noise"]

_CHUNK = 1 << 18


def signal_to_noise(grads: Gradients, *, correction: int = 1) -> Any:
    r"""Return the signal-to-noise ratio of each coordinate's gradient (GSNR).

    .. math:: \bar g^2 / \mathrm{Var}_e(g_e)

    It is high where environments agree in sign *and* size. For pure noise it is about 1/d.

    Args:
        grads: gradients of d environments: a tensor ``[d, *shape]``, a dict or list of them, or
            :class:`andmask_ext.Moments` with squares.
        correction: the variance is divided by ``d - correction``, as in :func:`torch.var`. Use 1 if
            the environments are a sample, 0 if they are all environments.

    Returns:
        One tensor ``[*shape]`` per parameter, float32, or float64 for float64 gradients. The form
        is that of ``grads``. For moments it is a list, with None for parameters without a gradient.
        It is zero where the mean is zero, and else infinite where the variance is zero.

    Raises:
        TypeError: ``grads`` has the wrong form or dtype, or ``correction`` is not an int.
        ValueError: there are ``correction`` or fewer environments, or moments keep no squares.

    Shape:
        - grads: :math:`(d, *)`
        - output: :math:`(*)`

    Example:
        >>> import torch, andmask_ext as am
        >>> am.metrics.signal_to_noise(torch.tensor([[1.0, -2.0], [3.0, 2.0]]))
        tensor([2., 0.])

    Reference:
        Liu et al., *Understanding why neural networks generalize well through GSNR of parameters*,
        ICLR 2020 (arXiv 2001.07384).
    """
    if not isinstance(correction, int) or isinstance(correction, bool):
        raise TypeError(f"correction: expected an int, but got {type(correction).__name__}")
    entries = entries_of(grads)
    environments = entries.environments
    if correction < 0 or environments <= correction:
        raise ValueError(
            f"correction: expected a number from 0 to environments - 1 = {environments - 1}, "
            f"but got {correction}"
        )
    return entries.like([
        _ratio(total / environments, squares / (environments - correction))
        for total, squares in zip(*_sums_and_squares(entries), strict=True)
    ])  # fmt: skip


def coherence(grads: Gradients, *, per_parameter: bool = False) -> Any:
    r"""Return the m-coherence of the environments: how far their gradients add up.

    .. math:: \|\sum_e g_e\|^2 / \sum_e \|g_e\|^2

    It is d if all gradients are equal, 1 if they are orthogonal, and 0 if they cancel. On average,
    a step on one environment helps this many environments.

    Args:
        grads: gradients of d environments: a tensor ``[d, *shape]``, a dict or list of them, or
            :class:`andmask_ext.Moments` with squares or norms.
        per_parameter: return one value for each parameter instead of one for all.

    Returns:
        A 0-dim float64 tensor. With ``per_parameter``, one per parameter in the form of ``grads``.
        NaN if all gradients are zero.

    Raises:
        TypeError: ``grads`` has the wrong form or dtype.
        ValueError: there is no environment, or moments keep neither squares nor norms.

    Example:
        >>> import torch, andmask_ext as am
        >>> am.metrics.coherence(torch.tensor([[3.0, 4.0], [3.0, -4.0]]))
        tensor(0.7200, dtype=torch.float64)

    Reference:
        Chatterjee and Zielinski, *Making coherence out of nothing at all*, 2020 (arXiv 2008.01217).
    """
    check_bool("per_parameter", per_parameter)
    entries = entries_of(grads)
    norm_of_sum, sum_of_norms = _squared_norms(entries)
    if per_parameter:
        return entries.like([a / b for a, b in zip(norm_of_sum, sum_of_norms, strict=True)])
    device = norm_of_sum[0].device
    return _total(norm_of_sum, device) / _total(sum_of_norms, device)


def squared_norms_of(tensors: list[Tensor]) -> list[Tensor]:
    """Return the squared norm of each tensor, 0-dim float64, with the range of float64."""
    return [squared_norm(tensor, torch.float64) for tensor in tensors]


def sums_of_squared_norms(moments: Moments, norm_of_sum: Sequence[Tensor]) -> list[Tensor] | None:
    """Return ``sum_e |g_e|^2`` of each touched parameter; None if the moments do not have it.

    Args:
        moments: moments, with norms or squares if possible.
        norm_of_sum: ``|sum_e g_e|^2`` of each touched parameter.
    """
    if moments.squared_norms is not None:
        return without_none(moments.squared_norms)
    if "squares" not in moments.kinds:
        return None
    return [
        deviations.sum(dtype=torch.float64) + total.to(deviations.device) / moments.count
        for deviations, total in zip(without_none(moments.squares), norm_of_sum, strict=True)
    ]


def _squared_norms(entries: Entries) -> tuple[list[Tensor], list[Tensor]]:
    """Return ``|sum_e g_e|^2`` and ``sum_e |g_e|^2`` of each parameter."""
    if entries.stacked is not None:
        sums = [grads.sum(0, dtype=wide_dtype(grads)) for grads in entries.stacked]
        return squared_norms_of(sums), squared_norms_of(entries.stacked)
    moments = entries.moments
    assert moments is not None
    norm_of_sum = squared_norms_of(without_none(moments.sum))
    sum_of_norms = sums_of_squared_norms(moments, norm_of_sum)
    if sum_of_norms is None:
        raise ValueError(
            "grads: expected moments with squares, or with norms (kinds=(..., 'norms'), or a "
            f"Monitor of every step), but got {moments}"
        )
    return norm_of_sum, sum_of_norms


def _sums_and_squares(entries: Entries) -> tuple[list[Tensor], list[Tensor]]:
    if entries.stacked is None:
        moments = entries.with_kinds("squares")
        return without_none(moments.sum), without_none(moments.squares)
    sums, squares = [], []
    for grads in entries.stacked:
        wide = grads.to(wide_dtype(grads))
        sums.append(wide.sum(0))
        columns = wide.reshape(len(grads), -1).split(max(1, _CHUNK // len(grads)), 1)
        variances = torch.cat([part.double().var(0, correction=0) for part in columns])
        squares.append(variances.view(grads.shape[1:]) * len(grads))
    return sums, squares


def _ratio(mean: Tensor, variance: Tensor) -> Tensor:
    ratio = mean.double().square() / variance.double()
    return torch.where((mean == 0) & (variance == 0), 0.0, ratio).to(mean.dtype)


def _total(values: list[Tensor], device: torch.device) -> Tensor:
    return torch.stack([value.to(device) for value in values]).sum()
