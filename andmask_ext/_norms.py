"""Squared norms whose rounding does not grow with the size of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dtypes import wide_dtype

# Elements whose squares are added up in the tensor's own precision; their sums join in float64.
# (torch.linalg.vector_norm of 16 million float32 numbers on a CPU is .06 % too small.)
_PART = 1 << 14


def squared_norms(rows: Tensor) -> Tensor:
    """Return the squared norm of each row, float64 ``[n]``; 16-bit types are widened.

    In float32 (of float32) squares beyond its range are lost, as in
    ``torch.nn.utils.clip_grad_norm_``.
    """
    wide = wide_dtype(rows)
    whole = rows.shape[1] // _PART * _PART
    parts = rows[:, :whole].unflatten(1, (-1, _PART)) if whole else rows[:, None, :0]
    norms: Tensor = torch.linalg.vector_norm(parts, dim=2, dtype=wide).double().square().sum(1)
    rest: Tensor = torch.linalg.vector_norm(rows[:, whole:], dim=1, dtype=wide)
    return norms + rest.double().square()


def squared_norm(tensor: Tensor) -> Tensor:
    """Return the squared norm of a tensor, 0-dim float64."""
    if not tensor.is_contiguous():  # the order does not matter: that of memory needs no copy
        strides = tensor.stride()
        dims = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
        tensor = tensor.permute(dims)
    return squared_norms(tensor.reshape(1, -1))[0]
