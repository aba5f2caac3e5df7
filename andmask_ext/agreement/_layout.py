"""The position of a batch in a tensor, and the evidence from which it is found."""

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
    """The batch axis of a tensor. It is [before, examples, after], flattened in row-major order.

    Flattened rows [batch, tokens] have before = 1 and after = tokens. Flattened rows
    [tokens, batch] have before = tokens and after = 1.
    """

    axis: int
    before: int
    after: int

    def split(self, tensor: Tensor, examples: int) -> Tensor:
        """Return a view in which ``axis`` is split into three: before, examples, after."""
        shape = tensor.shape
        return tensor.reshape(
            *shape[: self.axis], self.before, examples, self.after, *shape[self.axis + 1 :]
        )

    def spread(self, by_example: Tensor) -> Tensor:
        """Return the value of its example for each entry along ``axis``."""
        return by_example.repeat_interleave(self.after).repeat(self.before)

    def rows(self, matrix: Tensor, examples: int) -> Tensor:
        """Return ``[examples, rows of each, columns]`` of a matrix with examples in its rows."""
        if self.before == 1:
            return matrix.reshape(examples, self.after, matrix.shape[1])
        split = matrix.reshape(self.before, examples, self.after, matrix.shape[1])
        return split.transpose(0, 1).reshape(examples, self.before * self.after, matrix.shape[1])


def candidates(shape: Sequence[int], examples: int, axes: Sequence[int] | None) -> list[Layout]:
    """Return all possible layouts of a batch, the most usual ones first."""
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
    """The possible layouts of a node's output that agree with its gradients in all probes.

    A probe is a backward pass of :class:`MixingCheck`. After the first probe, the cotangents of
    each environment are multiplied by a different power of two. If environments do not mix, all
    gradients of an environment are multiplied by exactly its power.
    """

    def __init__(self, shape: Sequence[int], examples: int, axes: Sequence[int] | None) -> None:
        self.left = candidates(shape, examples, axes)
        self.seen = False  # whether any gradient was not zero
        self._examples = examples
        self._first: dict[int, Tensor] = {}  # per axis: the magnitudes in the first probe

    def add(self, delta: Tensor, factors: Tensor | None) -> None:
        """Use the gradient of one probe: drop the layouts that disagree with it.

        Args:
            delta: the gradient.
            factors: the factor of each example; None in the first probe.
        """
        for axis in {layout.axis for layout in self.left}:
            other = [dim for dim in range(delta.dim()) if dim != axis]
            magnitudes = delta.detach()
            if magnitudes.is_complex():
                magnitudes = magnitudes.abs()
            if other:  # vector_norm makes no copy of the tensor
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

    Powers of two are exact. But libraries choose the order of sums by the address of a tensor.
    """
    relative, absolute = _TOLERANCE[dtype.to_real()]
    peak = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()) if expected.numel() else 0.0
    return torch.allclose(values, expected, rtol=relative, atol=absolute * peak, equal_nan=True)


_TOLERANCE = {  # relative, and as a share of the largest value
    torch.float64: (1e-6, 1e-11),
    torch.float32: (1e-4, 1e-6),
    torch.bfloat16: (0.05, 1e-3),
    torch.float16: (0.05, 1e-2),
}


def environment_sum(
    tensor: Tensor, layout: Layout, groups: Groups, shape: Sequence[int]
) -> Tensor | None:
    """Sum a tensor per environment over the dimensions along which an operand was broadcast.

    Args:
        tensor: it has the shape of the result of the broadcast.
        layout: the batch axis of the tensor.
        groups: the environments.
        shape: the shape of the operand before the broadcast.

    Returns:
        ``[environments, *shape]`` in the dtype of sums; None if the operand varies along the batch
        axis.
    """
    single = layout.axis == 0 and groups.size == len(tensor) // groups.examples == 1
    if single and tensor.shape[1:] == torch.Size(shape):
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
    # Apart from the environment, only the operand's dimensions are left, in its order.
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
    """Return the layout of a tensor (None if there is none) and whether it is the only one.

    Args:
        evidence: the layouts that probes have left; None: there were no probes.
        shape: the shape of the tensor.
        examples: the number of examples in the batch.
        axes: the possible batch axes for a node of this type; None: any.
        trivial: there is only one environment, so any layout is correct.
    """
    left = candidates(shape, examples, axes)
    if evidence is not None and not trivial:
        left = [layout for layout in left if layout in evidence.left]
    if not left:
        return None, True
    # If the probes leave several layouts, all of them treat the gradients of this graph alike.
    # For another graph of the same structure they may differ.
    different = {
        (math.prod(shape[: at.axis]) * at.before, math.prod(shape[at.axis + 1 :]) * at.after)
        for at in left
    }
    alone = len(different) == 1
    return (left[0] if trivial or alone or evidence is not None else None), trivial or alone
