"""Chains of views between a parameter and its use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ._nodes import saved, shape_of


@dataclass(frozen=True)
class View:
    """The position of a view in a contiguous parameter.

    Attributes:
        size: the size of the view.
        stride: its stride.
        offset: the offset of its first element.
        full: whether it has all elements of the parameter.
        order: "same" if it has all elements in the parameter's order, "transposed" if it is the
            transpose of the parameter, else None.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    full: bool
    order: str | None

    def of(self, memory: Tensor, lead: int = 0) -> Tensor:
        """Return this view of contiguous memory, whose first ``lead`` dimensions are kept."""
        if lead == 0 and self.order == "same":
            return memory.view(self.size)
        return memory.as_strided(
            (*memory.shape[:lead], *self.size),
            (*memory.stride()[:lead], *self.stride),
            memory.storage_offset() + self.offset,
        )

    @property
    def interval(self) -> tuple[int, int] | None:
        """The elements [begin, end) of the parameter, if the view is one block; else None."""
        dims = sorted((s, n) for s, n in zip(self.stride, self.size, strict=True) if n != 1)
        expected = 1
        for stride, size in dims:
            if stride != expected:
                return None
            expected *= size
        return self.offset, self.offset + math.prod(self.size)


def _plain(tensor: Tensor, node: Node, output: int) -> Tensor:
    return tensor


def _reshaped(tensor: Tensor, node: Node, output: int) -> Tensor:
    return tensor.view(shape_of(node, output))


def _signed(number: int) -> int:
    return int(number) if number < 2**63 else int(number) - 2**64  # nodes save it as unsigned


def _transposed(tensor: Tensor, node: Node, output: int) -> Tensor:
    first, second = (_signed(saved(node, name)) for name in ("dim0", "dim1"))
    return tensor.transpose(first, second)


def _permuted(tensor: Tensor, node: Node, output: int) -> Tensor:
    return tensor.permute([_signed(dim) for dim in saved(node, "dims")])


def _sliced(tensor: Tensor, node: Node, output: int) -> Tensor:
    dim, step = (_signed(saved(node, name)) for name in ("dim", "step"))
    start, end = (None if (at := saved(node, name)) is None else _signed(at)
                  for name in ("start", "end"))  # fmt: skip
    sliced: Tensor = torch.ops.aten.slice.Tensor(tensor, dim, start, end, step)
    return sliced


def _selected(tensor: Tensor, node: Node, output: int) -> Tensor:
    return tensor.select(_signed(saved(node, "dim")), _signed(saved(node, "index")))


def _split(tensor: Tensor, node: Node, output: int) -> Tensor:
    dim = _signed(saved(node, "dim"))
    part: Tensor = tensor.split(int(saved(node, "split_size")), dim)[output]
    return part


def _split_with_sizes(tensor: Tensor, node: Node, output: int) -> Tensor:
    dim = _signed(saved(node, "dim"))
    part: Tensor = tensor.split([int(size) for size in saved(node, "split_sizes")], dim)[output]
    return part


def _unbound(tensor: Tensor, node: Node, output: int) -> Tensor:
    return tensor.unbind(_signed(saved(node, "dim")))[output]


# No data can enter these nodes, as they have one input. Views of parameters hold no batch.
VIEWS: Mapping[str, Callable[[Tensor, Node, int], Tensor]] = {
    "AliasBackward0": _plain,
    "CloneBackward0": _plain,
    "PermuteBackward0": _permuted,
    "ReshapeAliasBackward0": _reshaped,
    "SelectBackward0": _selected,
    "SliceBackward0": _sliced,
    "SplitBackward0": _split,
    "SplitWithSizesBackward0": _split_with_sizes,
    "SqueezeBackward0": _reshaped,
    "SqueezeBackward1": _reshaped,
    "SqueezeBackward2": _reshaped,
    "TBackward0": lambda tensor, node, output: tensor.t(),
    "ToCopyBackward0": _plain,
    "TransposeBackward0": _transposed,
    "TransposeBackward1": _transposed,
    "UnbindBackward0": _unbound,
    "UnsafeSplitBackward0": _split,
    "UnsafeViewBackward0": _reshaped,
    "UnsqueezeBackward0": _reshaped,
    "ViewBackward0": _reshaped,
}


def view_through(
    chain: Sequence[tuple[Node, int]],
    shape: Sequence[int],
    views: Mapping[str, Callable[[Tensor, Node, int], Tensor]] = VIEWS,
) -> View | None:
    """Return the view of a parameter that a chain of nodes computes; None: it is no view.

    Args:
        chain: the nodes, the one next to the parameter first, each with the output that is used.
        shape: the shape of the parameter.
        views: what the nodes do that are views.
    """
    tensor = torch.empty(shape, device="meta")
    for node, output in chain:
        replay = views.get(node.name())
        if replay is None:
            return None
        try:
            tensor = replay(tensor, node, output)
        except (AttributeError, RuntimeError):  # its arguments are not saved, or it is a copy
            return None
        if tuple(tensor.shape) != shape_of(node, output):
            return None
    full = tensor.numel() == math.prod(shape)
    order = None
    if full:
        if tensor.is_contiguous():
            order = "same"
        elif tensor.dim() == 2 and tensor.t().is_contiguous():
            order = "transposed"
    return View(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), full, order)
