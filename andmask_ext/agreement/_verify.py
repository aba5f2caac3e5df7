"""Comparison with the exact loop over environments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..moments import Moments
from ._forward import tensors_in
from ._groups import Environments, Groups, make_groups

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
    """One :class:`Deviation` per parameter, the largest first. ``print`` shows a table."""

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
        return "\n".join([*lines, f"{len(self)} parameters: {worst}"])


def sample(batch: Any, batch_dim: int, environments: Environments, most: int) -> tuple[Any, Groups]:
    """Return the examples of the first ``most`` environments, and their partition."""
    sizes = [t.shape[batch_dim] for t in tensors_in(batch) if t.dim() > batch_dim]
    if not sizes:
        raise ValueError("batch: expected tensors that hold the batch, but found none")
    groups = make_groups(environments, sizes[0])
    most = min(most, groups.environments)
    members = [groups.members(environment) for environment in range(most)]
    ids = torch.arange(most).repeat_interleave(torch.tensor([len(indices) for indices in members]))
    chosen = take(batch, torch.cat(members), batch_dim, sizes[0])
    return chosen, make_groups(ids, len(ids))


def take(batch: Any, examples: Tensor, batch_dim: int, size: int) -> Any:
    """Return these examples of every tensor whose batch dimension has the size ``size``."""
    if isinstance(batch, Tensor):
        if batch.dim() > batch_dim and batch.shape[batch_dim] == size:
            return batch.detach().index_select(batch_dim, examples.to(batch.device))
        if batch_dim > 0 and batch.dim() == 1 and len(batch) == size:  # labels
            return batch[examples.to(batch.device)]
        return batch
    if isinstance(batch, dict):
        return {key: take(item, examples, batch_dim, size) for key, item in batch.items()}
    if isinstance(batch, (list, tuple)):
        taken = [take(item, examples, batch_dim, size) for item in batch]
        return type(batch)(*taken) if hasattr(batch, "_fields") else type(batch)(taken)
    return batch


@contextmanager
def undisturbed(model: nn.Module, params: list[Tensor]) -> Iterator[None]:
    """Disable dropout. Afterwards restore gradients, buffers and modes."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    grads = [(param, param.grad) for param in (*model.parameters(), *params)]
    try:
        for module, training in modes:
            # Batch statistics are part of the model. On some devices, recurrent layers need
            # training mode for a backward pass; without dropout it changes nothing.
            keep = isinstance(module, _NormBase) or (
                isinstance(module, nn.RNNBase) and not module.dropout
            )
            module.training = training and keep
        for param, _ in grads:
            param.grad = None
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for param, grad in grads:
            param.grad = grad


def compare(
    names: list[str],
    params: list[Tensor],
    ours: Moments,
    environments: Iterator[Callable[[], Tensor]],
    tolerance: float | None,
) -> Verification:
    """Run the loop, one loss after the other, and compare its moments with ``ours``."""
    exact = Moments(params, ("votes",))
    doubtful = [torch.zeros_like(param, dtype=torch.int32) for param in params]
    largest = [0.0] * len(params)
    for loss in environments:
        for param in params:
            param.grad = None
        loss().backward()
        grads = [param.grad for param in params]
        for index, grad in enumerate(grads):
            if grad is not None and grad.numel():
                peak = float(grad.abs().max())
                largest[index] += peak
                doubtful[index] += grad.abs() <= (tolerance or _TOLERANCE[grad.dtype]) * peak
        exact.add([None if grad is None else grad.detach() for grad in grads])
    total = max(largest)
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
    return Verification(sorted(deviations, key=lambda d: (d.passed, -d.votes, -d.sums)))
