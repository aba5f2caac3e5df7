"""Where the examples of a batch lie in a tensor, and how that is found out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._dtypes import wide_dtype
from ._groups import Groups


@dataclass(frozen=True)
class Layout:
    """One axis of a tensor is [before, examples, after] in one, in row-major order.

    Rows [batch, tokens] flattened have before = 1, after = tokens; rows [tokens, batch] have
    before = tokens, after = 1.
    """

    axis: int
    before: int
    after: int

    def split(self, tensor: Tensor, examples: int) -> Tensor:
        """Return a view in which ``axis`` is three: before, examples, after."""
        shape = tensor.shape
        return tensor.reshape(
            *shape[: self.axis], self.before, examples, self.after, *shape[self.axis + 1 :]
        )

    def spread(self, by_example: Tensor) -> Tensor:
        """Return for each entry along ``axis`` the value of its example."""
        return by_example.repeat_interleave(self.after).repeat(self.before)

    def rows(self, matrix: Tensor, examples: int) -> Tensor:
        """Return ``[examples, rows of each, columns]`` of a matrix with examples in its rows."""
        if self.before == 1:
            return matrix.reshape(examples, self.after, matrix.shape[1])
        split = matrix.reshape(self.before, examples, self.after, matrix.shape[1])
        return split.transpose(0, 1).reshape(examples, self.before * self.after, matrix.shape[1])


def candidates(shape: Sequence[int], examples: int, axes: Sequence[int] | None) -> list[Layout]:
    """Return all places where a batch may lie, the most usual ones first."""
    layouts = []
    for axis in range(len(shape)) if axes is None else axes:
        if axis >= len(shape) or shape[axis] == 0 or shape[axis] % examples:
            continue
        factor = shape[axis] // examples
        befores = [b for b in range(1, factor + 1) if factor % b == 0]
        befores = [1, *befores[:0:-1]] if len(befores) > 1 else befores
        layouts += [Layout(axis, before, factor // before) for before in befores]
    return layouts


class Evidence:
    """Candidates for the layout of one node's output, and which of them its gradients leave.

    In probes after the first, the cotangents of each environment are multiplied by a power of two
    of its own. Where environments do not mix, that multiplies all gradients that belong to them by
    the same power, exactly; where they do, it does not.
    """

    def __init__(self, shape: Sequence[int], examples: int, axes: Sequence[int] | None) -> None:
        self.left = candidates(shape, examples, axes)
        self.seen = False  # any gradient that is not zero
        self._examples = examples
        self._first: dict[int, Tensor] = {}  # by axis: the magnitudes of the first probe

    def add(self, delta: Tensor, factors: Tensor | None) -> None:
        """Take note of the gradient of one probe.

        Args:
            delta: the gradient.
            factors: of each example; None: this is the first probe.
        """
        for axis in {layout.axis for layout in self.left}:
            other = [dim for dim in range(delta.dim()) if dim != axis]
            magnitudes = delta.detach()
            if magnitudes.is_complex():
                magnitudes = magnitudes.abs()
            if other:  # no copy of the tensor is made
                wide = wide_dtype(magnitudes)
                magnitudes = torch.linalg.vector_norm(magnitudes, 1, other, dtype=wide)
            magnitudes = magnitudes.abs().double().cpu()
            if factors is None:
                self._first[axis] = magnitudes
                self.seen = self.seen or bool((magnitudes != 0).any())
                continue
            if axis not in self._first:
                continue
            self.left = [
                layout
                for layout in self.left
                if layout.axis != axis
                or _equal(magnitudes / layout.spread(factors), self._first[axis], delta.dtype)
            ]


def _equal(values: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Compare up to rounding.

    Powers of two are exact, but libraries choose their order of sums by where a tensor lies.
    """
    relative, absolute = _TOLERANCE[dtype.to_real()]
    peak = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()) if expected.numel() else 0.0
    return torch.allclose(values, expected, rtol=relative, atol=absolute * peak, equal_nan=True)


_TOLERANCE = {  # relative; and of the largest
    torch.float64: (1e-6, 1e-11),
    torch.float32: (1e-4, 1e-6),
    torch.bfloat16: (0.05, 1e-3),
    torch.float16: (0.05, 1e-2),
}


def environment_sum(
    tensor: Tensor, layout: Layout, groups: Groups, shape: Sequence[int]
) -> Tensor | None:
    """Sum a tensor over everything but environments and the dimensions of a broadcast operand.

    Args:
        tensor: of the shape of the result of a broadcast.
        layout: where the batch lies in it.
        groups: the environments.
        shape: of the operand that was broadcast to the tensor's shape.

    Returns:
        ``[environments, *shape]`` in the dtype that sums are taken in; None where the operand
        varies along the axis of the batch.
    """
    if layout.axis == 0 and groups.size == len(tensor) // groups.examples == 1:
        if tensor.shape[1:] == torch.Size(shape):
            return tensor
    aligned = (1,) * (tensor.dim() - len(shape)) + tuple(shape)
    if aligned[layout.axis] != 1:
        return None
    equal = groups.size is not None
    count, size = (groups.environments, groups.size or 1) if equal else (groups.examples, 1)
    sizes: list[int] = []
    kept = [1]
    environment = 0
    for axis, (full, operand_size) in enumerate(zip(tensor.shape, aligned, strict=True)):
        if axis == layout.axis:
            environment = len(sizes) + 1
            sizes += [layout.before, count, size * layout.after]
            continue
        if operand_size != 1:
            kept.append(len(sizes))
        sizes.append(full)
    kept[0] = environment
    split = tensor.reshape(sizes)
    summed = [dim for dim in range(split.dim()) if dim not in kept and sizes[dim] != 1]
    if summed:
        split = split.sum(summed, keepdim=True, dtype=wide_dtype(tensor))
    # What is left beside the environment are the operand's own dimensions, in its order.
    result = split.movedim(environment, 0).reshape(count, *shape)
    return result if equal else sum_by_id(result, groups)


def sum_by_id(by_example: Tensor, groups: Groups) -> Tensor:
    """Sum ``[examples, ...]`` to ``[environments, ...]``."""
    wide = wide_dtype(by_example)
    result = by_example.new_zeros(groups.environments, *by_example.shape[1:], dtype=wide)
    return result.index_add_(0, groups.ids.to(by_example.device), by_example.to(wide))


def pick(
    evidence: Evidence | None,
    shape: Sequence[int],
    examples: int,
    axes: Sequence[int] | None,
    trivial: bool,
) -> tuple[Layout | None, bool]:
    """Return the layout of a tensor, None if there is none, and whether it is the only one.

    Args:
        evidence: what probes have shown of it; None: there were none.
        shape: of the tensor.
        examples: in the batch.
        axes: where the batch can be at all, for a node of this type.
        trivial: there is one environment only: any layout will do.
    """
    left = candidates(shape, examples, axes)
    if evidence is not None and not trivial:
        left = [layout for layout in left if layout in evidence.left]
    if not left:
        return None, True
    # Where the gradients of a graph leave several, these have no gradients that they would treat
    # differently; another graph of the same structure might.
    different = {
        (math.prod(shape[: at.axis]) * at.before, math.prod(shape[at.axis + 1 :]) * at.after)
        for at in left
    }
    alone = len(different) == 1
    return (left[0] if trivial or alone or evidence is not None else None), trivial or alone
