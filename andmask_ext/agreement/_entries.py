"""Contributions that wait until all uses of their parameter have arrived."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .._dtypes import wide_dtype
from ._contributions import (
    Contribution,
    Convolution,
    Lookup,
    Matrices,
    OneByOne,
    Outer,
    Shared,
    Stacked,
)
from ._graph import Graph, Operand
from ._nodes import refuse_sparse
from ._views import View


@dataclass
class Entry:
    """The contribution of one use, and the operand's graph down to the parameter."""

    contribution: Contribution
    operand: Operand
    graph: Graph

    @property
    def view(self) -> View:
        """The view of the parameter that the operand is. The operand must be a view."""
        assert self.operand.view is not None
        return self.operand.view

    def is_direct(self, param: Tensor, zeros_count: bool) -> bool:
        """Return whether a kernel can add this entry to its view of the moments.

        Args:
            param: the parameter.
            zeros_count: whether a gradient of zero changes the moments too.
        """
        contribution, view = self.contribution, self.view
        if isinstance(contribution, OneByOne):
            return False
        grads = contribution.grads
        if grads.is_complex() or wide_dtype(grads) != wide_dtype(param):  # there is a cast between
            return False
        if isinstance(contribution, (Outer, Convolution)):
            # In an environment without rows the gradient is zero.
            if zeros_count and contribution.groups.filled is not None:
                return False
            if isinstance(contribution, Outer):
                return _is_matrix(view, contribution)
            return view.order == "same"
        if isinstance(contribution, Matrices):
            return 1 in view.stride[1:] and (contribution.is_full or not zeros_count)
        if isinstance(contribution, Lookup):
            return view.order == "same" and not zeros_count
        return isinstance(contribution, Stacked)


def by_operand(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Put uses of the same operand together, so that their gradients go down to it as one."""
    uses: dict[tuple[int, ...], list[Entry]] = {}
    for number, entry in enumerate(entries):
        place = id(entry.graph), entry.operand.root, entry.operand.output
        own = isinstance(entry.contribution, Shared)
        uses.setdefault((*place, number) if own else place, []).append(entry)
    return list(uses.values())


def gradients_of(uses: Sequence[Entry], param: Tensor, begin: int, end: int) -> Tensor:
    """Return a parameter's gradients in environments [begin, end), one per row.

    Args:
        uses: entries of the same operand.
        param: the parameter.
        begin: see above.
        end: see above.
    """
    first = uses[0]
    stacked, view = first.contribution.stacked(begin, end), first.operand.view
    for use in uses[1:]:
        stacked = stacked + use.contribution.stacked(begin, end)
    if view is not None:
        stacked = stacked.real if stacked.is_complex() else stacked
        if wide_dtype(stacked) != wide_dtype(param):
            stacked = stacked.to(param.dtype)  # as the cast of the parameter does
        if view.order == "same":
            return stacked.reshape(end - begin, *param.shape)
        gradients = stacked.new_zeros(end - begin, *param.shape)
        view.of(gradients, 1).copy_(stacked)
        return gradients
    root, output = first.graph.nodes[first.operand.root], first.operand.output
    edge = GradientEdge(root, output)
    dtype = root._input_metadata[output].dtype
    if isinstance(first.contribution, Shared):  # the same for all, but for a factor
        whole = _through(edge, param, first.contribution.grads.to(dtype))
        return Shared(whole, param.shape, first.contribution.shares).stacked(begin, end)
    return torch.stack([_through(edge, param, grad.to(dtype)) for grad in stacked])


def _through(edge: GradientEdge, param: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of a parameter, given that of a function of it."""
    # Some formulas of torch take it for granted that a gradient begins its memory.
    grad = grad.clone(memory_format=torch.contiguous_format) if grad.storage_offset() else grad
    (through,) = torch.autograd.grad([edge], [param], [grad], True, materialize_grads=True)
    if through.layout != torch.strided:
        refuse_sparse()
    return through


def _is_matrix(view: View, contribution: Outer) -> bool:
    """Return whether a view of the moments is a matrix that the native op can add to."""
    if view.order is not None:
        return True
    memory = torch.empty_strided(view.size, view.stride, device="meta")
    columns = contribution.grads.shape[2], contribution.activations.shape[2]
    try:
        return 1 in memory.view(columns).stride()
    except RuntimeError:
        return False


def join_outer_products(entries: list[Entry]) -> list[Entry]:
    """Join outer products of the same view of a parameter into one with more rows."""
    first = entries[0]
    if len(entries) == 1 or not all(
        isinstance(entry.contribution, Outer) and entry.operand.view == first.operand.view
        for entry in entries
    ):
        return entries
    products = [entry.contribution for entry in entries if isinstance(entry.contribution, Outer)]
    if len({(product.grads.dtype, product.groups) for product in products}) > 1:
        return entries
    activations, grads = _cancelled([(one.activations, one.grads) for one in products]) or (
        torch.cat([product.activations for product in products], 1),
        torch.cat([product.grads for product in products], 1),
    )
    joined = Outer(activations, grads, products[0].groups, products[0].shape)
    return [Entry(joined, first.operand, first.graph)]


def _cancelled(products: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """Return the factors of the sum of two products that have one in common, but for the sign.

    As in `layer(a) - layer(b)`: where `a` and `b` are equal, the gradient of the loop is exactly
    zero, and that of one product of all rows would be rounding, which votes.
    """
    if len(products) != 2 or products[0][0].shape != products[1][0].shape:
        return None
    (rows, grads), (other_rows, other_grads) = products
    if grads.dtype.itemsize < 4:  # their products are exact in the sum, their sums are not
        return None
    for sign in (1, -1):
        if torch.equal(grads, sign * other_grads):
            return rows + sign * other_rows, grads
        if torch.equal(rows, sign * other_rows):
            return rows, grads + sign * other_grads
    return None


def covered(entries: Sequence[Entry], param: Tensor) -> int | None:
    """Return how many elements of a parameter are used; None if two uses may share one."""
    views = [entry.operand.view for entry in entries]
    if len(views) == 1 and views[0] is not None:
        return param.numel() if views[0].full else math.prod(views[0].size)
    intervals = []
    for view in views:
        interval = None if view is None else view.interval
        if interval is None:
            return None
        intervals.append(interval)
    intervals.sort()
    if any(end > begin for (_, end), (begin, _) in itertools.pairwise(intervals)):
        return None
    return sum(end - begin for begin, end in intervals)
