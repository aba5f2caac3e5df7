"""Chains of views between a parameter and its use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ._nodes import saved, shape_of

# What these nodes make of parameters carries no batch: nothing but their inputs enters them.
_CASTS = ("ToCopyBackward0",)
_SAME_ORDER = (
    "AliasBackward0",
    "CloneBackward0",
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
)
_TRANSPOSES = ("TBackward0",)
_OTHER_VIEWS = (
    "PermuteBackward0",
    "SelectBackward0",
    "SliceBackward0",
    "SplitBackward0",
    "SplitWithSizesBackward0",
    "TransposeBackward0",
    "TransposeBackward1",
    "UnbindBackward0",
    "UnsafeSplitBackward0",
)
VIEWS = frozenset((*_CASTS, *_SAME_ORDER, *_TRANSPOSES, *_OTHER_VIEWS))

# Nodes that read data which autograd does not see as an input (indices), or that make new rows.


def pull_back(tensor: Tensor, chain: Sequence[Node], lead: int) -> Tensor | None:
    """Bring a gradient from the end of a chain of views to its beginning.

    Args:
        tensor: ``lead`` dimensions, then those of the chain's end.
        chain: the nodes; the first made the operand, the last is the parameter's leaf.
        lead: 0 or 1; with 0 the result is a view, or None where that cannot be.

    Returns:
        None where the chain has nodes that are not permutations of all elements.
    """
    for node, following in zip(chain, chain[1:], strict=False):
        name = node.name()
        if name in _CASTS:
            continue
        if name in _SAME_ORDER:
            shape = (*tensor.shape[:lead], *shape_of(following))
            try:
                tensor = tensor.reshape(shape) if lead else tensor.view(shape)
            except RuntimeError:
                return None
        elif name in _TRANSPOSES:
            tensor = tensor.transpose(lead, lead + 1) if tensor.dim() == lead + 2 else tensor
        elif name in ("TransposeBackward0", "TransposeBackward1"):
            dims = [int(saved(node, f"dim{i}")) for i in (0, 1)]
            own = tensor.dim() - lead
            # dimensions are saved as unsigned numbers
            first, second = (lead + (dim if dim < own else dim - 2**64) % own for dim in dims)
            tensor = tensor.transpose(first, second)
        elif name == "PermuteBackward0":
            own = tensor.dim() - lead
            dims = [(d if d < own else d - 2**64) % own for d in map(int, saved(node, "dims"))]
            inverse = [0] * own
            for position, dim in enumerate(dims):
                inverse[dim] = position
            tensor = tensor.permute(*range(lead), *(lead + i for i in inverse))
        else:
            return None
    return tensor


def element_order(shape: Sequence[int], chain: Sequence[Node]) -> str | None:
    """Return how the elements of the chain's end lie: in the order of the parameter ("same"), in
    that of its transpose ("transposed"), or otherwise (None).
    """
    pulled = pull_back(torch.empty(shape, device="meta"), chain, 0)
    if pulled is None:
        return None
    if pulled.is_contiguous():
        return "same"
    return "transposed" if pulled.dim() == 2 and pulled.t().is_contiguous() else None
