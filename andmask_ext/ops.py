"""The operators as functions. ``torch.ops.andmask`` has the same operators.

The functions raise ValueError or TypeError where the ops raise RuntimeError. The functions also
work inside ``torch.func`` transforms and forward-mode differentiation.

Autocast does not affect the ops: they return the dtype of ``grads``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._autograd import inside_transform, masked_mean_for_transforms
from ._checks import check_bool, check_grads
from ._vote_test import given_levels, vote_test, warn_of_level

__all__ = ["agreement_mask", "masked_mean", "vote_histogram"]


def _checked(grads: Tensor, rescale: bool, zeros: str, **levels: float | None) -> dict[str, Any]:
    """Return the options of the native ops. Without a level, unanimity is asked for."""
    check_grads(grads)
    check_bool("rescale", rescale)
    given = given_levels(levels) or {"tau": 1.0}
    options = {"tau": None, "fdr": None, "significance": None, **given, "zeros": zeros}
    warn_of_level(vote_test(**options), grads.shape[0])
    return {**options, "rescale": rescale}


def masked_mean(
    grads: Tensor,
    tau: float | None = None,
    rescale: bool = False,
    *,
    fdr: float | None = None,
    significance: float | None = None,
    zeros: str = "count",
) -> Tensor:
    r"""Return the mean gradient over environments, zeroed where their signs do not agree.

    This is the AND-mask. Coordinate j is kept iff
    :math:`|\sum_e \mathrm{sign}(g_{ej})| \ge \tau d`. The comparison is made on integers, so it is
    exact for every :math:`\tau = k/d`. Zeros and NaN cast no vote. Small groups of environments are
    summed in float32 (float64 for float64), and these sums are added in float64. The mask
    multiplies the mean. So the result is not finite where the gradient of any environment is not
    finite, even at masked coordinates.

    Args:
        grads: stacked gradients ``[d, *shape]`` of d environments: float16, bfloat16, float32 or
            float64, any strides. If each environment's gradient is contiguous, no copy is made.
        tau: agreement threshold in [0, 1]. 0 keeps all (the plain mean), 1 asks for unanimity,
            which is what happens without ``tau``, ``fdr`` and ``significance``.
        rescale: divide by the share of kept coordinates of this tensor (plus 1e-10), as the
            authors' code does, so that masking does not shrink the step.
        fdr: false discovery rate, instead of ``tau``: see :class:`andmask_ext.AndMask`.
        significance: level of significance, instead of ``tau``: see :class:`andmask_ext.AndMask`.
        zeros: ``"count"`` or ``"abstain"``: see :class:`andmask_ext.AndMask`. With ``"abstain"``,
            ``fdr`` or ``significance``, sums are those of :class:`andmask_ext.Moments`.

    Returns:
        The masked mean ``[*shape]``, contiguous, in the dtype of ``grads``. It is differentiable:
        the gradient with respect to every environment is ``grad * mask / d``. The mask and the
        rescale factor are constant almost everywhere, so they have no derivative.

    Raises:
        TypeError: ``grads`` is not a dense floating-point tensor, a level is not a number, or
            ``rescale`` is not a bool.
        ValueError: ``grads`` has no environment, several levels are given, one lies outside its
            range, or ``zeros`` is unknown.

    Shape:
        - grads: :math:`(d, *)`
        - output: :math:`(*)`

    Example:
        >>> import torch, andmask_ext
        >>> grads = torch.tensor([[1.0, -2.0, 3.0], [3.0, 4.0, 5.0]])  # 2 environments
        >>> andmask_ext.ops.masked_mean(grads)
        tensor([2., 0., 4.])
        >>> andmask_ext.ops.masked_mean(grads, tau=0.0)
        tensor([2., 1., 4.])

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
    """
    options = _checked(grads, rescale, zeros, tau=tau, fdr=fdr, significance=significance)
    if inside_transform():
        return masked_mean_for_transforms(grads, options)
    out: Tensor = torch.ops.andmask.masked_mean.default(grads, **options)
    return out


def agreement_mask(
    grads: Tensor,
    tau: float | None = None,
    rescale: bool = False,
    *,
    fdr: float | None = None,
    significance: float | None = None,
    zeros: str = "count",
) -> Tensor:
    """Return the mask of :func:`masked_mean` alone: 1 where the environments agree, 0 elsewhere.

    Args:
        grads: as for :func:`masked_mean`.
        tau: as for :func:`masked_mean`.
        rescale: divide the mask by its mean (plus 1e-10).
        fdr: as for :func:`masked_mean`.
        significance: as for :func:`masked_mean`.
        zeros: as for :func:`masked_mean`.

    Returns:
        The mask ``[*shape]`` in float32 (float64 for float64), as the rescale factor may exceed the
        range of float16. It never requires grad.

    Raises:
        TypeError: as :func:`masked_mean`.
        ValueError: as :func:`masked_mean`.

    Shape:
        - grads: :math:`(d, *)`
        - output: :math:`(*)`

    Example:
        >>> import torch, andmask_ext
        >>> andmask_ext.ops.agreement_mask(torch.tensor([[1.0, -2.0, 3.0], [3.0, 4.0, 5.0]]))
        tensor([1., 0., 1.])

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
    """
    options = _checked(grads, rescale, zeros, tau=tau, fdr=fdr, significance=significance)
    out: Tensor = torch.ops.andmask.agreement_mask.default(grads, **options)
    return out


def vote_histogram(grads: Tensor) -> tuple[Tensor, Tensor]:
    r"""Count coordinates by the number of environments that agree, and sum their squared sums.

    For each k = 0 ... d it takes the coordinates j with
    :math:`|\sum_e \mathrm{sign}(g_{ej})| = k`. It returns their number and
    :math:`\sum_j (\sum_e g_{ej})^2`. From these follow the share of kept coordinates and the norm
    of the masked mean for *every* tau (:func:`andmask_ext.metrics.tau_curve`). It makes one pass
    over the gradients. NaN casts no vote, but makes the squares NaN.

    Args:
        grads: as for :func:`masked_mean`.

    Returns:
        Counts, int64 ``[d + 1]``, and squares, float64 ``[d + 1]``. They never require grad.

    Raises:
        TypeError: ``grads`` is not a dense floating-point tensor.
        ValueError: ``grads`` has no environment.

    Shape:
        - grads: :math:`(d, *)`
        - outputs: :math:`(d + 1)`

    Example:
        >>> import torch, andmask_ext
        >>> grads = torch.tensor([[1.0, -2.0, 3.0], [3.0, 4.0, 5.0]])  # 2 environments
        >>> andmask_ext.ops.vote_histogram(grads)
        (tensor([1, 0, 2]), tensor([ 4.,  0., 80.], dtype=torch.float64))

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
    """
    check_grads(grads)
    out: tuple[Tensor, Tensor] = torch.ops.andmask.vote_histogram.default(grads)
    return out
