"""Nodes that pick rows by an index: how the environments of rows follow from the index.

Such a node relates a large tensor, from which rows are picked or to which they are added, to a
small one, which holds the picked rows. Mixtures of experts, look-ups of the last token and graph
networks move rows like that, and the indices change at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ._graph import COPY_SLICES, Graph
from ._groups import Groups, group_rows
from ._layout import Layout
from ._nodes import saved, shape_of

# The number of the input that is the small tensor; None: the output is.
PICKING: dict[str, int | None] = {
    "CummaxBackward0": None,
    "CumminBackward0": None,
    "FlipBackward0": None,
    "GatherBackward0": None,
    "IndexAddBackward0": 1,
    "IndexBackward0": None,
    "IndexCopyBackward0": 1,
    "IndexPutBackward0": 1,
    "IndexReduceBackward0": 1,
    "IndexSelectBackward0": None,
    "KthvalueBackward0": None,
    "MaskedScatterBackward0": 1,
    "MaskedSelectBackward0": None,
    "MaxBackward0": None,
    "MedianBackward1": None,
    "MinBackward0": None,
    "ModeBackward0": None,
    "PackPaddedSequenceBackward0": None,
    "RollBackward0": None,
    "ScatterAddBackward0": 1,
    "ScatterBackward0": 1,
    "ScatterBackward1": 1,
    "ScatterReduceBackward0": 1,
    "SliceBackward0": None,
    "SortBackward0": None,
    "SplitBackward0": None,
    "SplitWithSizesBackward0": None,
    "TakeBackward0": None,
    "TopkBackward0": None,
}

# Nodes that put tensors one after the other, and those that repeat one.
JOINS = ("CatBackward0", "StackBackward0")
COPIES = ("ExpandBackward0", "RepeatBackward0")

# Nodes that may join rows, and the axes over which they sum: the number of an input, and its axis.
_LEFT_RIGHT = ((0, -1), (1, -2))
_ADDED = ((1, -1), (2, -2))
JOINING: dict[str, tuple[tuple[int, int], ...]] = {
    "AddmmBackward0": _ADDED,
    "AddmvBackward0": ((1, -1), (2, -1)),
    "BaddbmmBackward0": _ADDED,
    "BmmBackward0": _LEFT_RIGHT,
    "ConvolutionBackward0": ((0, 1), (0, 2), (0, 3), (0, 4)),
    "DotBackward0": ((0, -1), (1, -1)),
    "MmBackward0": _LEFT_RIGHT,
    "MvBackward0": ((0, -1), (1, -1)),
    "ScaledDotProductCudnnAttentionBackward0": ((1, -2), (2, -2)),
    "ScaledDotProductEfficientAttentionBackward0": ((1, -2), (2, -2)),
    "ScaledDotProductFlashAttentionBackward0": ((1, -2), (2, -2)),
    "ScaledDotProductFlashAttentionForCpuBackward0": ((1, -2), (2, -2)),
    "SparseAddmmBackward0": _ADDED,
}
# Nodes that make a tensor of other ones, or write into a part of it.
_PARTS = frozenset((*PICKING, *JOINS, COPY_SLICES))
_NORMS = ("FusedRmsNormBackward0", "NativeLayerNormBackward0")
# Nodes that sum over the axes that they save as ``dim``.
_REDUCING = frozenset((
    "AmaxBackward0", "AminBackward0", "CumprodBackward0", "CumsumBackward0",
    "LinalgVectorNormBackward0", "LogSoftmaxBackward0", "LogcumsumexpBackward0",
    "LogsumexpBackward0", "MeanBackward1", "NormBackward1", "ProdBackward1", "SoftmaxBackward0",
    "StdBackward0", "StdMeanBackward0", "SumBackward1", "VarBackward0", "VarMeanBackward0",
))  # fmt: skip
_ORDERING = (
    "CummaxBackward0", "CumminBackward0", "KthvalueBackward0", "MaxBackward0", "MedianBackward1",
    "MinBackward0", "ModeBackward0", "SortBackward0", "TopkBackward0",
)  # fmt: skip
_MOVES = ("FlipBackward0", "RollBackward0", "SliceBackward0", "SplitBackward0",
          "SplitWithSizesBackward0")  # fmt: skip
_BY_INDEX = ("IndexBackward0", "IndexPutBackward0")
_BY_ROW = ("IndexAddBackward0", "IndexCopyBackward0", "IndexReduceBackward0",
           "IndexSelectBackward0")  # fmt: skip

# The key of the metadata of a node of pack_padded_sequence: the number of rows of each step.
BATCH_SIZES = "andmask_ext.batch_sizes"

Rows = tuple[Tensor, int]  # the environment of each row, and the axis of the rows


@dataclass(frozen=True)
class Pick:
    """A node that picks rows of a tensor whose batch axis is known.

    Attributes:
        index: the index of the node.
        output: the number of its output, if it has several.
        large: the batch axis of the large tensor.
        small: the batch axis of the small one, which must follow from the index.
    """

    index: int
    output: int
    large: Layout
    small: Layout

    def rows(self, graph: Graph, partitions: Sequence[Groups]) -> Rows | None:
        """Return the environments of the rows of the small tensor; None: they have no single ones.

        Args:
            graph: the graph of the pass.
            partitions: those that were made before.
        """
        groups, large = partitions[self.large.partition], self.large
        if shape_of_large(graph, self.index)[large.axis] != large.size * groups.examples:
            return None
        return route(graph, self.index, self.output, large.spread(groups.ids), large.axis)


@dataclass(frozen=True)
class Join:
    """A node that joins tensors along their batch axis.

    Attributes:
        index: the index of the node.
        parts: the batch axes of the tensors.
        small: the batch axis of the result.
    """

    index: int
    parts: tuple[Layout, ...]
    small: Layout

    def rows(self, graph: Graph, partitions: Sequence[Groups]) -> Rows | None:
        """As :meth:`Pick.rows`."""
        ids = torch.cat([part.spread(partitions[part.partition].ids) for part in self.parts])
        axis = self.small.axis
        return (ids, axis) if len(ids) == shape_of(graph.nodes[self.index])[axis] else None


@dataclass(frozen=True)
class Same:
    """A tensor whose rows come by several ways, in which they must have the same environments.

    Attributes:
        layout: the batch axis of the tensor.
        small: the same by another way.
        steps: how often the other way has the first rows; 0: it has all of them.
    """

    layout: Layout
    small: Layout
    steps: int = 0

    def rows(self, graph: Graph, partitions: Sequence[Groups]) -> Rows:
        """As :meth:`Pick.rows`."""
        rows = self.layout.spread(partitions[self.layout.partition].ids)
        if self.steps:
            count = partitions[self.small.partition].examples // self.steps
            rows = rows[:count].repeat(self.steps)
        return rows, self.layout.axis


Move = Pick | Join | Same


def follow(moves: Sequence[Move], graph: Graph, batches: Sequence[Groups]) -> list[Groups] | None:
    """Return the partitions of a pass: those of the batch, and those of rows that were moved.

    Args:
        moves: in an order in which each partition is made before it is used.
        graph: the graph of the pass.
        batches: the partitions of the batch.

    Returns:
        None: rows are not moved as they were in the mixing check, which must run again.
    """
    partitions = list(batches)
    for move in moves:
        rows, small = move.rows(graph, partitions), move.small
        if rows is None or rows[1] != small.axis:
            return None
        if small.partition == len(partitions):
            partitions.append(group_rows(rows[0], batches[0].environments))
        elif not torch.equal(small.spread(partitions[small.partition].ids), rows[0]):
            return None
    return partitions


def summed(graph: Graph, index: int) -> Sequence[tuple[int, int]]:
    """Return the inputs of a node over whose axes it sums: the number of an input, and an axis."""
    name, node = str(graph.names[index]), graph.nodes[index]
    if name in JOINING:
        return JOINING[name]
    if name in _NORMS and graph.edges[index][0] is not None:
        return [(0, -axis - 1) for axis in range(len(saved(node, "normalized_shape")))]
    if name in _REDUCING:
        dims = saved(node, "dim")  # None: it sums over all of them
        listed = dims if isinstance(dims, Sequence) else () if dims is None else (dims,)
        return [(0, signed(dim)) for dim in listed]
    return ()


def broadcast(graph: Graph, index: int, weight: Sequence[bool] | None = None) -> list[int]:
    """Return the axes of the output of a node along which an input with a gradient is repeated.

    Args:
        graph: the graph of the node.
        index: the index of the node.
        weight: for each node, whether it is made of parameters only; those do not count.
    """
    name = graph.names[index]
    if name in _PARTS or (len(graph.edges[index]) < 2 and name not in COPIES):
        return []
    shape, axes = shape_of(graph.nodes[index]), set[int]()
    for entry in graph.edges[index]:
        if entry is not None and not (weight and weight[entry[0]]):
            size = shape_of(graph.nodes[entry[0]], entry[1])
            aligned = (1,) * (len(shape) - len(size)) + size
            repeated = [axis for axis, one in enumerate(aligned) if one == 1]
            if len(aligned) == len(shape) and all(
                axis in repeated or one == shape[axis] for axis, one in enumerate(aligned)
            ):
                axes.update(axis for axis in repeated if shape[axis] != 1)
    return sorted(axes)


def shape_of_large(graph: Graph, index: int) -> tuple[int, ...]:
    """Return the shape of the large tensor of a picking node."""
    if PICKING[str(graph.names[index])] is not None:
        return shape_of(graph.nodes[index])
    entry = graph.edges[index][0]
    assert entry is not None
    return shape_of(graph.nodes[entry[0]], entry[1])


def route(graph: Graph, index: int, output: int, ids: Tensor, axis: int) -> Rows | None:
    """Return the environment of each row of the small tensor; None: rows have no single one.

    Args:
        graph: the graph of the node.
        index: the index of the node.
        output: the number of its output.
        ids: the environment of each row of the large tensor along ``axis``.
        axis: the batch axis of the large tensor.
    """
    node, name = graph.nodes[index], str(graph.names[index])
    if name in _BY_INDEX:
        return _indexed(saved(node, "indices"), ids, axis)
    if name in _MOVES:
        return _moved(node, name, output, ids, axis)
    if name == "PackPaddedSequenceBackward0":
        sizes = node.metadata.get(BATCH_SIZES)  # type: ignore[attr-defined]
        if sizes is None or axis != (0 if saved(node, "batch_first") else 1):
            return None
        return torch.cat([ids[:count] for count in sizes.tolist()]), 0
    if name == "MaskedSelectBackward0":
        return _masked(saved(node, "mask"), ids, axis, shape_of_large(graph, index))
    if not hasattr(node, "_saved_dim"):
        return None
    dims = len(shape_of_large(graph, index))
    indices = None if name in _ORDERING else saved(node, "index")
    if indices is not None and name not in _BY_ROW and indices.dim() != dims:
        return None
    dim = signed(saved(node, "dim")) % max(1, dims)
    if name in _ORDERING:  # along another axis they stay in their row
        if dim == axis:
            return None
        return ids, axis - (dim < axis and len(shape_of(node)) < dims)
    assert indices is not None
    if name in _BY_ROW:
        return (ids[indices.cpu().reshape(-1)], axis) if dim == axis else (ids, axis)
    if dim == axis:
        return _along_one_axis(ids[indices.cpu()], 0)
    return ids[: indices.shape[axis]], axis


def _moved(node: Node, name: str, output: int, ids: Tensor, axis: int) -> Rows | None:
    count = max(1, len(shape_of(node)))
    if name in ("FlipBackward0", "RollBackward0"):
        dims = [signed(dim) % count for dim in saved(node, "dims")]
        if name == "RollBackward0" and not dims:  # it rolls the flattened tensor
            return None
        if axis not in dims:
            return ids, axis
        if name == "FlipBackward0":
            return ids.flip(0), axis
        return ids.roll(signed(saved(node, "shifts")[dims.index(axis)])), axis
    if signed(saved(node, "dim")) % count != axis:
        return ids, axis
    if name == "SliceBackward0":
        start, end, step = (saved(node, argument) for argument in ("start", "end", "step"))
        first, last = (None if one is None else signed(one) for one in (start, end))
        return ids[slice(first, last, int(step))], axis
    if name == "SplitBackward0":
        return ids.split(int(saved(node, "split_size")))[output], axis
    return ids.split([int(size) for size in saved(node, "split_sizes")])[output], axis


def signed(dim: Any) -> int:
    """Return a dimension that may be negative."""
    return int(dim) if dim < 2**63 else int(dim) - 2**64  # nodes save dimensions as unsigned


def _indexed(indices: Sequence[Tensor | None], ids: Tensor, axis: int) -> Rows | None:
    places: dict[int, Tensor] = {}  # by dimension of the large tensor
    dim = 0
    for one in indices:
        if one is not None and one.dtype in (torch.bool, torch.uint8):
            for found in one.nonzero(as_tuple=True):
                places[dim] = found.cpu()
                dim += 1
            continue
        if one is not None:
            places[dim] = one.cpu()
        dim += 1
    lead = torch.broadcast_tensors(*places.values())[0].shape  # broadcast_shapes takes longer
    used = sorted(places)
    adjacent = used == list(range(used[0], used[0] + len(used)))
    at = used[0] if adjacent else 0  # where the dimensions of the indices go
    if axis in places:
        return _along_one_axis(ids[places[axis].expand(lead)], at)
    before = sum(one < axis for one in used)
    return ids, axis - before + (len(lead) if not adjacent or before else 0)


def _masked(mask: Tensor, ids: Tensor, axis: int, shape: Sequence[int]) -> Rows:
    view = [1] * len(shape)
    view[axis] = -1
    everywhere = torch.broadcast_shapes(mask.shape, tuple(shape))
    return ids.view(view).expand(everywhere)[mask.cpu().expand(everywhere)], 0


def _along_one_axis(ids: Tensor, first: int) -> Rows | None:
    """Return ids that vary along one axis only, with the number of this axis from ``first`` on."""
    if 0 in ids.shape:
        return ids.new_empty(0), first + ids.shape.index(0)
    for axis in range(ids.dim()):
        rows = ids.movedim(axis, 0).reshape(ids.shape[axis], -1)
        if bool((rows == rows[:, :1]).all()):
            return rows[:, 0].contiguous(), first + axis
    return None
