"""Normalisation of the examples of each environment by its mean and variance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..agreement._groups import Groups

# The number of elements that are normalised together, or one environment if it has more. It is
# small enough for intermediate results to stay in cache.
_BLOCK = 2**18


@dataclass(frozen=True)
class Piece:
    """Environments of equal size that are normalised together.

    Attributes:
        rows: the indices of their examples, one environment after the other.
        environments: the indices of the environments.
        count: the number of environments.
    """

    rows: slice | Tensor
    environments: slice | Tensor
    count: int

    def take(self, x: Tensor) -> Tensor:
        """Return the piece's examples."""
        return x[self.rows] if isinstance(self.rows, slice) else x.index_select(0, self.rows)

    def put(self, x: Tensor, part: Tensor) -> None:
        """Write to the piece's examples."""
        if isinstance(self.rows, slice):
            x[self.rows].copy_(part)
        else:
            x.index_copy_(0, self.rows, part)


def pieces(groups: Groups, x: Tensor) -> Iterator[Piece]:
    """Yield the pieces that make up a batch."""
    example = max(1, x[0].numel())
    if groups.size is not None:
        step = max(1, _BLOCK // (groups.size * example))
        for first in range(0, groups.environments, step):
            last = min(first + step, groups.environments)
            rows = slice(first * groups.size, last * groups.size)
            yield Piece(rows, slice(first, last), last - first)
        return
    assert groups.offsets is not None
    for size in groups.sizes.unique().tolist():
        alike = (groups.sizes == size).nonzero().squeeze(1)
        for environments in alike.split(max(1, _BLOCK // (size * example))):
            starts = groups.offsets[environments]
            chosen = (starts.unsqueeze(1) + torch.arange(size)).flatten()
            if groups.order is not None:
                chosen = groups.order[chosen]
            yield Piece(chosen.to(x.device), environments.to(x.device), len(environments))


def normalize(x: Tensor, groups: Groups, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return normalised ``x``, and mean and unbiased variance ``[environments, channels]``."""
    parts = list(pieces(groups, x))
    normal, _, mean, variance = _Normalize.apply(x, groups, parts, eps)  # type: ignore[no-untyped-call]
    return normal, mean, variance


class _Normalize(torch.autograd.Function):
    """Normalisation that saves its output, not its input: the next op saves the output anyway."""

    @staticmethod
    def forward(x: Tensor, groups: Groups, parts: list[Piece], eps: float) -> tuple[Tensor, ...]:
        shape = (groups.environments, x.shape[1])
        scale, mean, variance = (x.new_empty(shape) for _ in range(3))
        normal = torch.empty_like(x)
        for part in parts:
            taken = part.take(x)
            large = part.count == 1 and taken.numel() > _BLOCK
            results = (_normalize_one if large else _normalize_some)(taken, part.count, eps)
            part.put(normal, results[0])
            for kept, new in zip((scale, mean, variance), results[1:], strict=True):
                kept[part.environments] = new
        return normal, scale, mean, variance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.groups, ctx.parts, ctx.eps = inputs
        normal, scale, mean, variance = output
        ctx.environment_of_rows = ctx.groups.ids  # the check for mixing compares them
        ctx.mark_non_differentiable(mean, variance)
        ctx.save_for_backward(normal, scale)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, scale_grad: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        normal, scale = ctx.saved_tensors
        if grad is None or scale_grad is not None or torch.is_grad_enabled():
            input_grad = _differentiable_input_grad(grad, scale_grad, normal, scale, ctx.groups)
            return input_grad, None, None, None
        result = torch.empty_like(normal)
        for part in ctx.parts:
            taken = part.take(normal)
            large = part.count == 1 and taken.numel() > _BLOCK
            function = _input_grad_of_one if large else _input_grad_of_some
            part.put(result, function(part.take(grad), taken, scale[part.environments]))
        return result, None, None, None


def _normalize_one(x: Tensor, _: int, eps: float) -> tuple[Tensor, ...]:
    # With momentum 1 the running statistics become those of the batch.
    mean, variance = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
    normal, _, scale = torch.ops.aten.native_batch_norm.default(
        x, None, None, mean, variance, True, 1.0, eps
    )
    return normal, scale, mean, variance


def _normalize_some(x: Tensor, count: int, eps: float) -> tuple[Tensor, ...]:
    parts = _by_channel(x, count)
    values = parts.shape[1] * parts.shape[3]
    mean = parts.mean((1, 3), keepdim=True)
    normal = parts - mean
    squares = normal.square().sum((1, 3), keepdim=True)
    scale = (squares / values + eps).rsqrt_()
    normal *= scale
    statistics = (scale, mean, squares / (values - 1))
    return normal.reshape(x.shape), *(s.view(count, -1) for s in statistics)


def _input_grad_of_one(grad: Tensor, normal: Tensor, scale: Tensor) -> Tensor:
    """Return ``scale * (grad - mean(grad) - normal * mean(grad * normal))``.

    This is the gradient of a batch norm whose input has mean 0 and variance 1, and whose weight is
    ``scale``.
    """
    weight = scale.flatten()
    result: Tensor = torch.ops.aten.native_batch_norm_backward.default(
        grad,
        normal,
        weight,
        None,
        None,
        torch.zeros_like(weight),
        torch.ones_like(weight),
        True,
        0.0,
        [True, False, False],
    )[0]
    return result


def _input_grad_of_some(grad: Tensor, normal: Tensor, scale: Tensor) -> Tensor:
    g, n = _by_channel(grad, len(scale)), _by_channel(normal, len(scale))
    slope = (g * n).mean((1, 3), keepdim=True)
    result = torch.addcmul(g - g.mean((1, 3), keepdim=True), n, slope, value=-1)
    return result.mul_(scale[:, None, :, None]).reshape(grad.shape)


def _by_channel(x: Tensor, count: int) -> Tensor:
    """Return ``[count * size, channels, *]`` as ``[count, size, channels, positions]``."""
    return x.reshape(count, x.shape[0] // count, x.shape[1], -1)


def _differentiable_input_grad(
    grad: Tensor | None, scale_grad: Tensor | None, normal: Tensor, scale: Tensor, groups: Groups
) -> Tensor | None:
    """Return the gradient of the input, computed by differentiable operations."""
    ids = groups.ids.to(normal.device)
    values = (groups.sizes * normal[0, 0].numel()).to(normal).unsqueeze(1)

    def per_example(statistic: Tensor) -> Tensor:
        return statistic[ids].view(*normal.shape[:2], *[1] * (normal.dim() - 2))

    def mean(x: Tensor) -> Tensor:
        sums = x.reshape(*normal.shape[:2], -1).sum(2)
        return per_example(torch.zeros_like(scale).index_add(0, ids, sums) / values)

    result = None
    if grad is not None:
        result = per_example(scale) * (grad - mean(grad) - normal * mean(grad * normal))
    if scale_grad is not None:
        term = normal * per_example(scale.square() * scale_grad / values)
        result = -term if result is None else result - term
    return result
