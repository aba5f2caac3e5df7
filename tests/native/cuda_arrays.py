"""Arrays for the tests of CUDA bodies: at addresses that suit packs of 16 bytes, or not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DTYPES = [np.float16, np.uint16, np.float32, np.float64]  # uint16: the bits of bfloat16


def wide_type(dtype: type) -> type:
    """Return the type that moments and state of these gradients or parameters have."""
    return np.float64 if dtype is np.float64 else np.float32


def stored(values: NDArray, dtype: type) -> NDArray:
    """Return values in a dtype; bfloat16 by cutting off the bits that it lacks."""
    if dtype is not np.uint16:
        return values.astype(dtype)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def aligned(shape: tuple[int, ...], dtype: type, skip: int = 0) -> NDArray:
    """Return an empty array that begins ``skip`` elements after a 256-byte boundary."""
    size = int(np.prod(shape)) + skip
    itemsize = np.dtype(dtype).itemsize
    memory = np.empty(size * itemsize + 256, np.uint8)
    start = -memory.ctypes.data % 256
    return memory[start : start + size * itemsize].view(dtype)[skip:].reshape(shape)


def placed(values: NDArray, skip: int) -> NDArray:
    """Return a copy that begins ``skip`` elements after a 256-byte boundary."""
    copy = aligned(values.shape, values.dtype.type, skip)
    copy[...] = values
    return copy


def same_bits(one: NDArray, other: NDArray) -> bool:
    """Which of two NaN an operation keeps is not said: all NaN are one here."""
    if one.dtype.kind == "f":
        one, other = (np.where(np.isnan(a), a.dtype.type(np.nan), a) for a in (one, other))
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()
