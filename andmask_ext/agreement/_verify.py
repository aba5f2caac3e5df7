"""Comparison with the exact loop over environments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..moments import Moments
from ._batches import batch_size, take
from ._groups import Checked, make_groups
from ._losses import losses_that_are_no_mean
from ._randomness import RandomNumbers, without_dropout

# The difference that rounding may cause, as a share of a parameter's largest gradient.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Deviation:
    """The deviation of one parameter from the exact loop.

    Attributes:
        name: the name of the parameter.
        sums: the largest difference of a sum, as a share of the parameter's largest gradient.
        votes: the number of coordinates whose votes differ. Coordinates with a gradient so small
            that rounding decides its sign do not count.
        coordinates: the number of elements of the parameter.
        tolerance: the largest value of ``sums`` that passes.
    """

    name: str
    sums: float
    votes: int
    coordinates: int
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the parameter agrees with the loop."""
        return self.sums <= self.tolerance and self.votes == 0


class Verification(tuple[Deviation, ...]):
    """One :class:`Deviation` per parameter, the largest first. ``print`` shows a table.

    Attributes:
        cause: if not all agree, what is wrong with ``loss_fn`` and what to do, as far as its values
            tell. None: the loss fits, so the model is not what it is for each environment alone.
    """

    cause: str | None = None

    @property
    def passed(self) -> bool:
        """Whether all parameters agree with the loop."""
        return all(deviation.passed for deviation in self)

    def __str__(self) -> str:
        names = [deviation.name for deviation in self]
        width = max(map(len, names))
        lines = [f"{'parameter'.ljust(width)}  deviation of sums  votes that differ"]
        lines += [
            f"{name.ljust(width)}  {deviation.sums:17.1e}  {deviation.votes} of "
            f"{deviation.coordinates}{'' if deviation.passed else '  <- differs'}"
            for name, deviation in zip(names, self, strict=True)
        ]
        worst = "all agree with the loop" if self.passed else "NOT ALL AGREE WITH THE LOOP"
        lines.append(f"{len(self)} parameters: {worst}")
        return "\n".join([*lines, f"cause: {self.cause}"] if self.cause else lines)


class Sample:
    """The first environments of a batch.

    Args:
        batch: tensors, arrays and containers of them.
        batch_dim: their batch dimension.
        environments: as for the context.
        most: the number of environments that are compared at most.

    Attributes:
        batch: the examples of these environments.
        groups: their partition.
    """

    def __init__(self, batch: Any, batch_dim: int, environments: Checked, most: int) -> None:
        if most < 1:
            raise ValueError(f"most: expected at least 1 environment, but got {most}")
        ids = environments if isinstance(environments, Tensor) else None
        self._whole, self._dim = batch, batch_dim
        self._size = batch_size(batch, batch_dim, ids)
        groups = make_groups(environments, self._size)
        self._members = [groups.members(e) for e in range(min(most, groups.environments))]
        sizes = torch.tensor([len(members) for members in self._members])
        ids = torch.arange(len(sizes)).repeat_interleave(sizes)
        self.groups = make_groups(ids, len(ids))
        self.batch = take(batch, torch.cat(self._members), batch_dim, self._size)

    def parts(self) -> Iterator[Any]:
        """Yield the batch of each environment."""
        for members in self._members:
            yield take(self._whole, members, self._dim, self._size)


@contextmanager
def undisturbed(model: nn.Module, params: list[Tensor]) -> Iterator[None]:
    """Disable dropout. Afterwards restore gradients, buffers and modes."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    grads = [(param, param.grad) for param in (*model.parameters(), *params)]
    try:
        for param, _ in grads:
            param.grad = None
        with without_dropout(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for param, grad in grads:
            param.grad = grad


class Losses:
    """Evaluates the loss of the batch and of its environments, each with the same random numbers.

    Args:
        loss: returns the loss of a batch.
        sample: the batch.
        batch_dim: its batch dimension.
        reduction: the reduction of the loss, as ``loss_reduction`` says.
    """

    def __init__(
        self, loss: Callable[[Any], Tensor], sample: Sample, batch_dim: int, reduction: str
    ) -> None:
        self._loss, self._sample = loss, sample
        self._batch_dim, self._reduction = batch_dim, reduction
        self._numbers = RandomNumbers()
        self._total = math.nan
        self._parts: list[float] = []
        self._noticed: str | None = None

    def whole(self) -> Tensor:
        """Return the loss of the batch."""
        loss = self._loss(self._sample.batch)
        if isinstance(loss, Tensor) and loss.numel() == 1 and loss.grad_fn is not None:
            self._total = float(loss.detach())
            root = get_gradient_edge(loss).node
            with torch._C.DisableTorchFunction():  # the context shall not see this
                self._noticed = losses_that_are_no_mean(
                    [root], self._sample.groups, self._batch_dim, self._reduction
                )
        return loss

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the loss of each environment, the mean of its examples."""
        sizes = self._sample.groups.sizes.tolist()
        for part, size in zip(self._sample.parts(), sizes, strict=True):
            self._numbers.rewind()
            loss = self._loss(part)
            self._parts.append(float(loss.detach()))
            yield loss / size if self._reduction == "sum" else loss
        self._numbers.rewind()

    def cause(self, tolerance: float) -> str | None:
        """Return why the losses do not fit together, or None if they do."""
        sizes = self._sample.groups.sizes.tolist()
        weighted = [part * size for part, size in zip(self._parts, sizes, strict=True)]
        expected = {"mean": sum(weighted) / sum(sizes), "sum": sum(self._parts)}
        allowed = tolerance * sum(map(abs, weighted)) / sum(sizes)
        fits = {
            "mean": abs(self._total - expected["mean"]) <= allowed,
            "sum": abs(self._total - expected["sum"]) <= allowed,
        }
        other = "sum" if self._reduction == "mean" else "mean"
        if fits[other] and not fits[self._reduction]:
            return (
                f"the loss is the {other} over the examples, but Agreement has "
                f"loss_reduction={self._reduction!r}; pass loss_reduction={other!r} to it"
            )
        if self._numbers.drawn:
            return (
                "loss_fn draws random numbers beside those of dropout, and no draws for a batch "
                "fit those for a part of it, so nothing is known; switch the noise off, or draw it "
                "before and put it into the batch"
            )
        if fits[self._reduction]:
            return None
        return self._noticed or (
            f"the loss of the batch is {self._total:.6g}, but the {self._reduction} over its "
            f"environments is {expected[self._reduction]:.6g}; class weights, ignored or padded "
            "labels and losses that compare examples do this; take the loss of each example "
            "(reduction='none') and then its mean"
        )


def compare(
    names: list[str],
    params: list[Tensor],
    ours: Moments,
    losses: Losses,
    tolerance: float | None,
) -> Verification:
    """Run the loop, one loss after the other, and compare its moments with ``ours``."""
    exact = Moments(params, ("votes",))
    doubtful = [torch.zeros_like(param, dtype=torch.int32) for param in params]
    largest = [0.0] * len(params)
    for param in params:
        param.grad = None
    for loss in losses:
        loss.backward()
        grads = [param.grad for param in params]
        for index, grad in enumerate(grads):
            if grad is not None and grad.numel():
                peak = float(grad.abs().max())
                largest[index] += peak
                doubtful[index] += grad.abs() <= (tolerance or _TOLERANCE[grad.dtype]) * peak
        exact.add([None if grad is None else grad.detach() for grad in grads])
        for param in params:
            param.grad = None
    total = max(largest)
    if total == 0 and not any(one is not None and one.any() for one in ours.sum):
        raise ValueError(
            "loss_fn: expected a loss with gradients to compare, but all of them are zero in the "
            "loop; verify the model after a few steps, or with other data"
        )
    deviations = []
    for index, (name, param) in enumerate(zip(names, params, strict=True)):
        pairs = []
        for kind in ("sum", "votes"):
            values = [getattr(moments, kind)[index] for moments in (ours, exact)]
            pairs.append([torch.zeros_like(param) if v is None else v for v in values])
        (sum_a, sum_b), (votes_a, votes_b) = pairs
        # A gradient that is zero up to rounding is compared with those of other parameters.
        allowed = tolerance or _TOLERANCE[param.dtype]
        scale = max(largest[index], min(1.0, 100 * allowed) * total) or 1.0
        sums = float((sum_a.double() - sum_b.double()).abs().max()) / scale if param.numel() else 0
        noise = largest[index] <= 0.1 * allowed * total
        differing = (votes_a.long() - votes_b.long()).abs() > 2 * doubtful[index]
        deviations.append(
            Deviation(
                name, sums, 0 if noise else int(differing.sum()), param.numel(), allowed
            )
        )  # fmt: skip
    found = Verification(sorted(deviations, key=lambda d: (d.passed, -d.votes, -d.sums)))
    if not found.passed:
        found.cause = losses.cause(max(deviation.tolerance for deviation in deviations))
    return found
