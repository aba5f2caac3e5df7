"""Arrays for the tests of kernels, at addresses that suit packs of 16 bytes or not; and moments."""

from __future__ import annotations

from types import SimpleNamespace

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


def empty_moments(
    shape: int | tuple[int, ...], dtype: type = np.float32, votes: type = np.int16
) -> SimpleNamespace:
    """Return moments that hold rubbish: the first environment must overwrite it."""
    wide = wide_type(dtype)
    return SimpleNamespace(
        sum=np.full(shape, np.nan, wide),
        votes=np.full(shape, 101, votes),
        squares=np.full(shape, np.nan, wide),
        logs=np.full(shape, np.nan, wide),
    )


def same_bits(left: NDArray, right: NDArray) -> bool:
    """Which of two NaN an operation keeps is not said: all NaN are one here."""
    if left.dtype.kind == "f":
        left, right = (np.where(np.isnan(a), a.dtype.type(np.nan), a) for a in (left, right))
    return left.dtype == right.dtype and left.tobytes() == right.tobytes()
