"""The dtype of sums, and the names of dtypes in messages."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype | Tensor) -> torch.dtype:
    """Return the dtype in which sums are kept: float64 for float64, else float32."""
    if isinstance(dtype, Tensor):
        dtype = dtype.dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name without ``torch.``, as in ``float32``."""
    return str(dtype).removeprefix("torch.")
