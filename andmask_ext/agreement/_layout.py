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

    Attributes:
        axis: the axis of the tensor.
        before: see above.
        after: see above.
        partition: which partition says the environment of each example; 0: that of the batch.
    """

    axis: int
    before: int
    after: int
    partition: int = 0

    @property
    def size(self) -> int:
        """The number of entries of ``axis`` for each example."""
        return self.before * self.after

    def split(self, tensor: Tensor, examples: int) -> Tensor:
        """Return a view in which ``axis`` is split into three: before, examples, after."""
        shape = tensor.shape
        return tensor.reshape(
            *shape[: self.axis], self.before, examples, self.after, *shape[self.axis + 1 :]
        )

    def spread(self, by_example: Tensor) -> Tensor:
        """Return the value of its example for each entry along ``axis``."""
        return by_example.unsqueeze(1).expand(self.before, -1, self.after).reshape(-1)

    def rows(self, matrix: Tensor, examples: int) -> Tensor:
        """Return ``[examples, rows of each, columns]`` of a matrix with examples in its rows."""
        if self.before == 1:
            return matrix.reshape(examples, self.after, matrix.shape[1])
        split = matrix.reshape(self.before, examples, self.after, matrix.shape[1])
        return split.transpose(0, 1).reshape(examples, self.before * self.after, matrix.shape[1])


def candidates(
    shape: Sequence[int], examples: int, axes: Sequence[int] | None, partition: int = 0
) -> list[Layout]:
    """Return all possible layouts of a batch, the most usual ones first."""
    layouts = []
    for axis in range(len(shape)) if axes is None else axes:
        if axis >= len(shape) or 0 in (shape[axis], examples) or shape[axis] % examples:
            continue
        factor = shape[axis] // examples
        befores = [b for b in range(1, factor + 1) if factor % b == 0]
        befores = [1, *befores[:0:-1]] if len(befores) > 1 else befores
        layouts += [Layout(axis, before, factor // before, partition) for before in befores]
    return layouts


class Code:
    """A power of two for each environment, in each of a few probes.

    Any two environments have different powers in at least one probe.

    Args:
        environments: their number, at least 2.
        largest: the largest exponent.
    """

    def __init__(self, environments: int, largest: int) -> None:
        self.environments = environments
        base = largest + 1
        few = environments <= base
        self._step = largest // (environments - 1) if few else 1
        self._base = environments if few else base
        numbers = torch.arange(environments)
        self.exponents: list[Tensor] = []
        while not self.exponents or bool((numbers > 0).any()):
            self.exponents.append(numbers % self._base * self._step)
            numbers = numbers // self._base

    def decode(self, exponents: Sequence[Tensor]) -> Tensor | None:
        """Return the environment that has these exponents; None: there is none for some entry."""
        total = torch.zeros_like(exponents[0])
        for number, found in enumerate(exponents):
            digits = found.div(self._step, rounding_mode="floor")
            if bool(((found % self._step != 0) | (digits < 0) | (digits >= self._base)).any()):
                return None
            total += digits * self._base**number
        return None if bool((total >= self.environments).any()) else total


class Evidence:
    """The environment of each row of a node's output, read from its gradients in the probes.

    A probe is a backward pass of :class:`MixingCheck`. After the first probe, the cotangents of
    each environment are multiplied by a power of two. If a row depends on one environment only, its
    gradient is multiplied by exactly the power of that environment, which names it.

    Args:
        shape: the shape of the output.
        axes: the axes that may hold the batch; None: all.
        single: read the environment of each element, not of each row along an axis.
    """

    def __init__(
        self, shape: Sequence[int], axes: Sequence[int] | None, single: bool = False
    ) -> None:
        self.shape = tuple(shape)
        self.seen = False  # whether any gradient was not zero
        self._axes = [a for a in (range(len(shape)) if axes is None else axes) if a < len(shape)]
        if single:
            self._axes = [ALL]
        self._first: dict[int, Tensor] = {}  # per axis: the magnitudes in the first probe
        self._exponents: dict[int, list[Tensor]] = {}
        self._none: dict[int, Tensor] = {}  # rows without a gradient
        self._ids: dict[int, Tensor | None] = {}

    def add(self, delta: Tensor, probe: int) -> None:
        """Use the gradient of one probe. Probe 0 has no powers."""
        for axis in self._axes:
            magnitudes = _magnitudes(delta.detach(), axis)
            if probe == 0:
                self._begin(axis, magnitudes, delta.dtype)
            elif axis in self._exponents and len(self._exponents[axis]) == probe - 1:
                self._compare(axis, magnitudes, delta.dtype)

    def _begin(self, axis: int, magnitudes: Tensor, dtype: torch.dtype) -> None:
        if axis in self._first:  # a function that is called again, as in a second inner pass
            return
        finite = magnitudes.nan_to_num(0.0, 0.0, 0.0)
        peak = float(finite.max()) if finite.numel() else 0.0
        self.seen = self.seen or bool((magnitudes != 0).any())
        self._first[axis] = magnitudes
        self._none[axis] = ~(magnitudes > _TOLERANCE[dtype.to_real()][1] * peak)  # NaN, too
        self._exponents[axis] = []

    def _compare(self, axis: int, magnitudes: Tensor, dtype: torch.dtype) -> None:
        relative, absolute = _TOLERANCE[dtype.to_real()]
        first, none = self._first[axis], self._none[axis]
        known = ~none & first.isfinite()
        ratio = torch.where(known, magnitudes, 1.0) / torch.where(known, first, 1.0)
        exponents = ratio.clamp(2.0**-60, 2.0**60).log2().round()
        peak = float(first[known].max()) if bool(known.any()) else 0.0
        error = (ratio * torch.exp2(-exponents) - 1).abs() * torch.where(known, first, 0.0)
        # Powers of two are exact. But libraries choose the order of sums by the address of a
        # tensor.
        fits = error <= relative * first.nan_to_num(0.0) + absolute * peak
        fits |= ~known
        fits &= known | ~(magnitudes > _LARGEST * absolute * peak) | ~first.isfinite()
        if bool(fits.all()):
            self._exponents[axis].append(exponents.long())
        else:  # environments mix along this axis
            del self._exponents[axis]

    def ids(self, axis: int, code: Code) -> Tensor | None:
        """Return the environment of each row along an axis, int64; -1: it has no gradient.

        None: rows do not belong to one environment each.
        """
        if axis not in self._ids:
            exponents = self._exponents.get(axis)
            found = None
            if exponents is not None and len(exponents) == len(code.exponents):
                none = self._none[axis] | ~self._first[axis].isfinite()
                found = code.decode([torch.where(none, 0, e) for e in exponents])
                if found is not None:
                    found = torch.where(none, -1, found)
            self._ids[axis] = found
        return self._ids[axis]

    def is_clear(self, axis: int) -> bool:
        """Return whether the rows along an axis that count as without a gradient have none."""
        first = self._first[axis]
        return bool((first[self._none[axis] | ~first.isfinite()] == 0).all())


ALL = -1  # in place of an axis: each element by itself
_LARGEST = 2.0**15


def _magnitudes(delta: Tensor, axis: int) -> Tensor:
    """Return the sum of magnitudes of each row along an axis, float64 on the CPU."""
    if delta.is_complex():
        delta = delta.abs()
    if axis == ALL:
        return delta.abs().flatten().double().cpu()
    other = [dim for dim in range(delta.dim()) if dim != axis]
    if other:  # vector_norm makes no copy of the tensor
        delta = torch.linalg.vector_norm(delta, 1, other, dtype=wide_dtype(delta))
    return delta.abs().double().cpu()


_TOLERANCE = {  # relative, and as a share of the largest value
    torch.float64: (1e-6, 1e-11),
    torch.float32: (1e-4, 1e-6),
    torch.bfloat16: (0.05, 1e-3),
    torch.float16: (0.05, 1e-2),
}


def fits(expected: Tensor, ids: Tensor) -> bool:
    """Return whether rows that have a gradient belong to the expected environments."""
    return len(expected) == len(ids) and bool(((expected == ids) | (ids < 0)).all())


def split_of(shape: Sequence[int], layout: Layout) -> tuple[int, int, int]:
    """Return what a layout says of the elements in row-major order, whatever their shape."""
    before = math.prod(shape[: layout.axis]) * layout.before
    return before, math.prod(shape[layout.axis + 1 :]) * layout.after, layout.partition


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
