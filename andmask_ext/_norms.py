"""Squared norms and scalar products whose rounding error does not grow with the size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._dtypes import wide_dtype

# Squares of this many elements are added up in the dtype of sums. These sums are added in float64.
# (torch.linalg.vector_norm of 16 million float32 numbers on a CPU is 0.06 % too small.)
_PART = 1 << 14
_CACHED = 1 << 18  # number of elements that are widened together
_CHUNK_BYTES = 8 << 20  # of stacked gradients that are widened together


def squared_norms(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the squared norm of each row, float64 ``[n]``.

    Args:
        rows: ``[n, columns]``.
        dtype: the dtype of the partial sums. None: :func:`wide_dtype`. It is fast, but squares
            beyond the range of float32 overflow or vanish, as in
            ``torch.nn.utils.clip_grad_norm_``. With float64 they do not.
    """
    dtype = dtype or wide_dtype(rows)
    whole = rows.shape[1] // _PART * _PART
    parts = rows[:, :whole].unflatten(1, (-1, _PART)) if whole else rows[:, None, :0]
    norms: Tensor = torch.linalg.vector_norm(parts, dim=2, dtype=dtype).double().square().sum(1)
    rest: Tensor = torch.linalg.vector_norm(rows[:, whole:], dim=1, dtype=dtype)
    return norms + rest.double().square()


def squared_norm(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the squared norm of a tensor, 0-dim float64; ``dtype`` as in :func:`squared_norms`."""
    if not tensor.is_contiguous():  # the order does not matter; memory order needs no copy
        strides = tensor.stride()
        dims = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
        tensor = tensor.permute(dims)
    row = tensor.reshape(1, -1)
    if dtype in (None, tensor.dtype) or tensor.is_cuda:
        return squared_norms(row, dtype)[0]
    return torch.stack([squared_norms(part, dtype) for part in row.split(_CACHED, 1)]).sum()


def squared_norms_over_environments(
    grads: Sequence[Tensor], weights: list[float], stacked: bool
) -> list[Tensor]:
    """Return the sum over environments of the squared norm of each gradient, 0-dim float64.

    Args:
        grads: gradients of one environment; with ``stacked`` ``[environments, *shape]``.
        weights: a factor for each environment, or one for all, or none.
        stacked: see ``grads``.
    """
    if stacked and len(weights) > 1:
        return [
            torch.stack(
                [squared_norm(row) * weight**2 for row, weight in zip(grad, weights, strict=True)]
            ).sum()
            for grad in grads
        ]
    factor = weights[0] ** 2 if weights else 1.0
    return [squared_norm(grad) * factor for grad in grads]


def scalar_products(grads: Tensor) -> Tensor:
    """Return the scalar products of all pairs of stacked gradients, float64 ``[d, d]``."""
    environments = grads.shape[0]
    flat = grads.reshape(environments, -1)
    total = flat.new_zeros(environments, environments, dtype=torch.float64)
    columns = max(1, _CHUNK_BYTES // (8 * environments))
    for chunk in flat.split(columns, 1):
        wide = chunk.double()
        total += wide @ wide.t()
    return total


def merged_norms(
    params: Sequence[Tensor],
    mine: Sequence[Tensor | None] | None,
    theirs: Sequence[Tensor | None] | None,
) -> list[Tensor | None]:
    """Return the sums of two lists of squared norms, one per parameter, on its device."""
    nothing: list[Tensor | None] = [None] * len(params)
    merged: list[Tensor | None] = []
    for param, one, two in zip(params, mine or nothing, theirs or nothing, strict=True):
        two = None if two is None else two.to(param.device)
        merged.append(one if two is None else two if one is None else one + two)
    return merged
