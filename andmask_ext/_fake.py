"""Fake kernels: shape, dtype and device of the ops' results, for torch.compile and export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library  # noqa: F401  # loads the ops
from ._checks import check_grads
from ._dtypes import wide_dtype
from ._vote_test import given_levels, vote_test


def _masked_mean(
    grads: Tensor,
    tau: float | None = None,
    rescale: bool = False,
    *,
    fdr: float | None = None,
    significance: float | None = None,
    zeros: str = "count",
) -> Tensor:
    check_grads(grads)
    given = given_levels({"tau": tau, "fdr": fdr, "significance": significance}) or {"tau": 1.0}
    vote_test(given.get("tau"), given.get("fdr"), given.get("significance"), zeros)
    return grads.new_empty(grads.shape[1:])


def _agreement_mask(grads: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    wide = wide_dtype(grads)
    return _masked_mean(grads, *args, **kwargs).to(wide)


torch.library.register_fake("andmask::masked_mean", _masked_mean)
torch.library.register_fake("andmask::agreement_mask", _agreement_mask)


def _aggregate(
    grads: Tensor,
    rule: str,
    arguments: Sequence[float],
    rescale: bool = False,
    noise: Tensor | None = None,
) -> Tensor:
    check_grads(grads)
    # Asking for the value of a symbolic size would fix it.
    environments = grads.shape[0] if isinstance(grads.shape[0], int) else 2**31 - 1
    torch.ops.andmask._check_aggregate(
        rule, list(arguments), environments, rescale, noise is not None
    )
    wide = wide_dtype(grads)
    if noise is not None and (noise.shape != grads.shape[1:] or noise.dtype != wide):
        raise ValueError(
            f"noise: expected {wide} of shape {tuple(grads.shape[1:])}, "
            f"but got {noise.dtype} of shape {tuple(noise.shape)}"
        )
    return grads.new_empty(grads.shape[1:])


torch.library.register_fake("andmask::_aggregate", _aggregate)


# ---- histograms of votes ----


def _vote_histogram(grads: Tensor) -> tuple[Tensor, Tensor]:
    check_grads(grads)
    shape = (grads.shape[0] + 1,)
    return grads.new_empty(shape, dtype=torch.int64), grads.new_empty(shape, dtype=torch.float64)


def _vote_histograms(sum: list[Tensor], votes: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    shape = (len(sum), count + 1)
    return sum[0].new_empty(shape, dtype=torch.int64), sum[0].new_empty(shape, dtype=torch.float64)


torch.library.register_fake("andmask::vote_histogram", _vote_histogram)
torch.library.register_fake("andmask::_vote_histograms", _vote_histograms)


# ---- moments: in-place ops on lists; the kernels check the arguments ----


def _accumulate_(
    sum: list[Tensor],
    votes: list[Tensor],
    squares: list[Tensor],
    logs: list[Tensor],
    voters: list[Tensor],
    grads: list[Tensor],
    count: int,
    weights: Sequence[float] = (),
    stacked: bool = False,
) -> None:
    return None


def _resolve(
    sum: list[Tensor],
    votes: list[Tensor],
    squares: list[Tensor],
    logs: list[Tensor],
    voters: list[Tensor],
    count: int,
    rule: str,
    arguments: Sequence[float],
    rescale: bool = False,
) -> list[Tensor]:
    return [torch.empty_like(total) for total in sum]


def _squared_norm(
    sum: list[Tensor],
    votes: list[Tensor],
    squares: list[Tensor],
    logs: list[Tensor],
    voters: list[Tensor],
    count: int,
    rule: str,
    arguments: Sequence[float],
    rescale: bool = False,
) -> Tensor:
    return sum[0].new_empty((), dtype=torch.float64)


def _in_place(*args: object, **kwargs: object) -> None:
    return None


torch.library.register_fake("andmask::_accumulate_", _accumulate_)
torch.library.register_fake("andmask::_resolve", _resolve)
torch.library.register_fake("andmask::_squared_norm", _squared_norm)


def _vote_thresholds(
    votes: list[Tensor],
    voters: list[Tensor],
    count: int,
    level: float,
    criterion: int,
    abstain: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = len(votes)
    thresholds = votes[0].new_empty((tensors, count + 1 if abstain else 1), dtype=torch.int32)
    counts = votes[0].new_empty((tensors,), dtype=torch.int64)
    return thresholds, counts, torch.empty_like(counts)


torch.library.register_fake("andmask::_vote_thresholds", _vote_thresholds)
for _name in (
    "_accumulate_outer_",
    "_accumulate_convolution_",
    "_resolve_",
    "_sgd_step_",
    "_adam_step_",
    "_temporal_adam_step_",
):
    torch.library.register_fake(f"andmask::{_name}", _in_place)
