"""The operators as functions; ``torch.ops.andmask`` holds the same ones.

These raise ValueError and TypeError where those raise RuntimeError, and they also work inside
``torch.func`` transforms and forward-mode differentiation.

Under autocast the ops do not cast: they compute in, and return, the dtype of ``grads``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._autograd import inside_transform, masked_mean_for_transforms
from ._checks import check_bool, check_grads, check_tau

__all__ = ["agreement_mask", "masked_mean", "vote_histogram"]


def _check(grads: Tensor, tau: float, rescale: bool) -> None:
    check_grads(grads)
    check_tau(tau)
    check_bool("rescale", rescale)


def masked_mean(grads: Tensor, tau: float = 1.0, rescale: bool = False) -> Tensor:
    r"""Mean gradient over environments, zeroed where their signs do not agree (the AND-mask).

    Coordinate j is kept iff :math:`|\sum_e \mathrm{sign}(g_{ej})| \ge \tau d`. The comparison is
    exact for every :math:`\tau = k/d`: it is made on integers. A zero (of either sign) or NaN
    casts no vote. Sums are taken in float32 (float64 for float64) over groups of environments and
    in float64 beyond. The mask multiplies, so NaN and infinities are never hidden: where any
    environment holds one, the result is not finite, kept or not.

    Args:
        grads: stacked gradients; dim 0 is the environment. float16, bfloat16, float32 or float64,
            any strides. No copy is made where each environment's gradient is contiguous.
        tau: agreement threshold in [0, 1]. 0 keeps all (the plain mean), 1 asks for unanimity.
        rescale: divide by the share of kept coordinates (plus 1e-10) of this tensor, as the
            authors' code does, so that masking does not shrink the step.

    Returns:
        The masked mean, dtype of ``grads``, contiguous. Differentiable: the gradient with respect
        to every environment is ``grad * mask / d`` (mask and rescale factor held constant, which
        they are almost everywhere).

    Raises:
        TypeError: ``grads`` is not a dense floating-point tensor, ``tau`` not a number, or
            ``rescale`` not a bool.
        ValueError: ``grads`` has no environment, or ``tau`` lies outside [0, 1].

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
    _check(grads, tau, rescale)
    if inside_transform():
        return masked_mean_for_transforms(grads, tau, rescale)
    out: Tensor = torch.ops.andmask.masked_mean.default(grads, tau, rescale)
    return out


def agreement_mask(grads: Tensor, tau: float = 1.0, rescale: bool = False) -> Tensor:
    """Return the mask of :func:`masked_mean` alone: 1 where the environments agree, 0 elsewhere.

    Args:
        grads: as for :func:`masked_mean`.
        tau: as for :func:`masked_mean`.
        rescale: divide the mask by its mean (plus 1e-10).

    Returns:
        The mask in float32 (float64 for float64): the factor of ``rescale`` may be beyond float16.
        It never requires grad.

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
    _check(grads, tau, rescale)
    out: Tensor = torch.ops.andmask.agreement_mask.default(grads, tau, rescale)
    return out


def vote_histogram(grads: Tensor) -> tuple[Tensor, Tensor]:
    r"""Count coordinates by how many environments agree, and add up the squares of their sums.

    For k = 0 ... d: of the coordinates with :math:`|\sum_e \mathrm{sign}(g_{ej})| = k` their number
    and :math:`\sum_j (\sum_e g_{ej})^2`. From these follow the share of kept coordinates and the
    norm of the masked mean for *every* tau at once
    (:func:`andmask_ext.metrics.tau_curve`). One pass over the gradients. NaN casts no vote, and
    shows in the squares.

    Args:
        grads: as for :func:`masked_mean`.

    Returns:
        Counts, int64, and squares, float64. They never require grad.

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
