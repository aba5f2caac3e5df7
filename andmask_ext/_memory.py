"""The tensors of Moments: one per parameter and kind of sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._dtypes import wide_dtype

# In addition to "sum", in the order of the native ops.
KINDS = ("votes", "squares", "logs", "voters")
_COUNTED = {"votes", "voters"}
_LOG_OF_ZERO = math.log(1e-10)
_VOTE_DTYPES = (torch.int8, torch.int16, torch.int32)


class Memory:
    """Sums over environments for a list of parameters.

    An environment touches a parameter by adding a gradient. The first one allocates the
    parameter's tensors. They stay after :meth:`reset`, so the next step allocates nothing.

    Args:
        params: the parameters. The tensors have their shape, device and layout.
        kinds: the kinds to keep in addition to ``"sum"``, a subset of ``KINDS``.
    """

    def __init__(self, params: Sequence[Tensor], kinds: Sequence[str]) -> None:
        self.params = list(params)
        self.kinds = ("sum", *(kind for kind in KINDS if kind in kinds))
        self._slots: list[dict[str, Tensor]] = [{} for _ in self.params]
        self._is_touched = [False] * len(self.params)
        self._vote_dtype = torch.int8

    @property
    def touched(self) -> list[int]:
        """The indices of the parameters that any environment has touched."""
        return [index for index, touched in enumerate(self._is_touched) if touched]

    def is_touched(self, index: int) -> bool:
        """Return whether any environment has touched a parameter."""
        return self._is_touched[index]

    def get(self, kind: str) -> list[Tensor | None]:
        """Return the sums of one kind; None for untouched parameters."""
        return [
            slot[kind] if touched else None
            for slot, touched in zip(self._slots, self._is_touched, strict=True)
        ]

    def lists(self, indices: Sequence[int]) -> list[list[Any]]:
        """Return sum, votes, squares, logs, voters of some parameters; those not kept are empty."""
        return [
            [self._slots[index][kind] for index in indices] if kind in self.kinds else []
            for kind in ("sum", *KINDS)
        ]

    def reset(self) -> None:
        """Drop all environments, but keep the tensors for reuse."""
        self._is_touched = [False] * len(self.params)

    def release_sums(self) -> None:
        """Release the sums of touched parameters, which have a new owner."""
        for index in self.touched:
            del self._slots[index]["sum"]

    def widen_votes(self, environments: int) -> None:
        """Widen the dtype of votes if this many environments would overflow it."""
        if "votes" not in self.kinds or environments <= torch.iinfo(self._vote_dtype).max:
            return
        self._vote_dtype = next(t for t in _VOTE_DTYPES if environments <= torch.iinfo(t).max)
        for slot in self._slots:
            for kind in _COUNTED & slot.keys():
                slot[kind] = slot[kind].to(self._vote_dtype)

    def touch(self, index: int, count: int) -> None:
        """Allocate the tensors of a parameter if needed, and add its earlier zero gradients.

        Args:
            index: the index of the parameter.
            count: the number of earlier environments. If it is 0, the tensors are not initialised,
                as the first environment overwrites them.
        """
        if self._is_touched[index]:
            return
        self._is_touched[index] = True
        param, slot = self.params[index], self._slots[index]
        for kind in self.kinds:
            kept, dtype = slot.get(kind), self._dtype(kind, param)
            same = kept is not None and kept.dtype == dtype and kept.device == param.device
            if kept is None or not same or kept.shape != param.shape:  # resized by `.data`, say
                slot[kind] = torch.empty_like(param, dtype=dtype, requires_grad=False)
            if count:
                slot[kind].fill_(_of_zeros(kind, count))

    def _dtype(self, kind: str, param: Tensor) -> torch.dtype:
        if kind in _COUNTED:
            return self._vote_dtype
        return wide_dtype(param)

    def merge(self, other: Memory, count: int, other_count: int) -> None:
        """Add other sums of the same parameters and kinds.

        Args:
            other: the other sums.
            count: the number of environments here.
            other_count: the number of environments there, positive.
        """
        if count == 0:
            self._vote_dtype = max(
                self._vote_dtype, other._vote_dtype, key=lambda dtype: dtype.itemsize
            )
        self.widen_votes(count + other_count)
        for index in sorted({*self.touched, *other.touched}):
            self._merge_one(index, other, count, other_count)

    def _merge_one(self, index: int, other: Memory, count: int, other_count: int) -> None:
        self.touch(index, count)
        mine = self._slots[index]
        if count == 0:
            for total in mine.values():
                total.zero_()
        theirs = {
            kind: other._slots[index][kind].to(total.device)
            if other._is_touched[index]
            else torch.full_like(total, _of_zeros(kind, other_count))
            for kind, total in mine.items()
        }
        if "squares" in mine:
            mine["squares"] += theirs["squares"]
            if count:  # the squared difference of the means (Chan, Golub and LeVeque 1979)
                deviation = theirs["sum"] / other_count - mine["sum"] / count
                share = count * other_count / (count + other_count)
                mine["squares"] += deviation.square_().mul_(share)
        for kind in mine.keys() - {"squares"}:
            mine[kind] += theirs[kind]

    def load(self, index: int, saved: dict[str, Tensor]) -> None:
        """Copy saved sums of one parameter."""
        self.touch(index, 0)
        for kind, tensor in saved.items():
            self._slots[index][kind].copy_(tensor)


def _of_zeros(kind: str, count: int) -> float:
    """Return the sum of one kind over ``count`` environments with gradient zero."""
    return count * _LOG_OF_ZERO if kind == "logs" else 0
