"""Whether a gradient is that of the authors' loop, as far as rounding lets one tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .models import Batch, loss
from .peers import TAU, formula, split

ROUNDING = 1e-5  # relative to the largest gradient of a tensor; below it, a sign may be noise
CHUNK = 1 << 18  # coordinates at a time
CLOSE = 1e-4  # relative to the largest masked mean of a tensor


@dataclass(frozen=True)
class Deviation:
    """How a gradient differs from the loop's."""

    masked_otherwise: int  # coordinates that one keeps and the other masks, beyond rounding
    difference: float  # largest where both keep, relative to the largest of that parameter
    decided: float  # share of the coordinates in which rounding cannot decide

    @property
    def exact(self) -> bool:
        """Whether rounding explains all of it."""
        return not self.masked_otherwise and self.difference <= CLOSE

    def __str__(self) -> str:
        notes = [f"{self.masked_otherwise} coordinates masked otherwise than in the loop"]
        notes = notes * (self.masked_otherwise > 0)
        notes += [f"largest difference {self.difference:.0e}"] * (not self.difference <= CLOSE)
        return ", ".join(notes)


class Loop:
    """The gradient of the authors' loop, and where it could have come out otherwise.

    An environment's gradient that is tiny beside others of its tensor may have either sign, or
    none, when the same sum is taken in another order. Where such votes could carry a coordinate
    over the threshold, nothing can be said of it. Exact zeros are votes of nobody: they are there
    because a unit is off.
    """

    def __init__(self, model: nn.Module, batch: Batch, environments: int) -> None:
        params = list(model.parameters())
        rows = [
            torch.autograd.grad(loss(model, part), params) for part in split(batch, environments)
        ]
        columns = [list(column) for column in zip(*rows, strict=True)]
        del rows
        self._means: list[Tensor] = []
        self._decided: list[Tensor] = []
        for column in columns:
            grads = torch.stack(column).flatten(1)
            column.clear()
            noise = ROUNDING * torch.linalg.vector_norm(grads, math.inf, dim=1, keepdim=True)
            parts = grads.split(CHUNK, dim=1)
            self._means.append(torch.cat([formula(part) for part in parts]))
            self._decided.append(torch.cat([_decided(part, noise) for part in parts]))

    def compare(self, own: Sequence[Tensor | None]) -> Deviation:
        """Compare a gradient with the loop's, parameter by parameter; None is never exact."""
        masked = decided = 0
        difference = 0.0
        for given, mean, sure in zip(own, self._means, self._decided, strict=True):
            grad = torch.full_like(mean, math.nan) if given is None else given.flatten()
            masked += int((((grad == 0) != (mean == 0)) & sure).sum())
            decided += int(sure.sum())
            gap = float(((grad - mean).abs() * ((grad != 0) & (mean != 0))).max())
            largest = float(mean.abs().max())
            if not math.isfinite(gap):
                difference = math.inf
            elif largest > 0:
                difference = max(difference, gap / largest)
        return Deviation(masked, difference, decided / sum(map(Tensor.numel, self._means)))


def _decided(grads: Tensor, noise: Tensor) -> Tensor:
    """Return where votes of gradients as small as noise cannot matter."""
    needed = math.ceil(TAU * len(grads) - 1e-6)
    loose = (grads.abs() <= noise) & (grads != 0)
    firm = torch.where(loose, 0.0, grads.sign()).sum(0).abs()
    turns = loose.sum(0)
    return (firm - turns >= needed) | (firm + turns < needed)
