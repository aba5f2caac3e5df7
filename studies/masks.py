"""Masks that the library does not have, and what a mask lets pass, for records of training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import andmask_ext as am


@torch.no_grad()
def passed(rule: am.rules.Rule, moments: am.Moments) -> tuple[float, float]:
    """Return the share of all coordinates that pass, and the least vote among those of one tensor.

    The vote is a share of the environments, in the largest tensor; NaN where nothing passes there.
    A coordinate whose mean gradient is exactly zero counts as not passed.
    """
    pairs = [
        (update != 0, votes)
        for update, votes in zip(rule.update(moments), moments.votes, strict=True)
        if update is not None and votes is not None
    ]
    kept = sum(int(mask.sum()) for mask, _ in pairs) / sum(mask.numel() for mask, _ in pairs)
    mask, votes = max(pairs, key=lambda pair: pair[0].numel())
    least = int(votes[mask].abs().min()) / moments.count if mask.any() else math.nan
    return kept, least


class Mask(ABC):
    """A mask on the mean gradient, made from moments; it may remember former steps."""

    @abstractmethod
    def masks(self, moments: am.Moments) -> list[Tensor]:
        """Return which coordinates pass, for each parameter."""

    @torch.no_grad()
    def apply(
        self, params: Sequence[nn.Parameter], moments: am.Moments, rescale: bool
    ) -> tuple[float, float]:
        """Mask ``.grad`` of the parameters; return what :func:`passed` does."""
        masks = self.masks(moments)
        for param, mask in zip(params, masks, strict=True):
            assert param.grad is not None
            param.grad.mul_(mask)
            if rescale:
                param.grad.div_(1e-10 + mask.float().mean())
        kept = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        index = max(range(len(masks)), key=lambda i: masks[i].numel())
        votes = moments.votes[index]
        assert votes is not None
        inside = votes[masks[index]]
        return kept, int(inside.abs().min()) / moments.count if len(inside) else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Return what it remembers: nothing, unless a subclass does."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        assert not state
