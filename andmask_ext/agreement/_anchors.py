"""Anchors: tensors whose batch axis is known, from which the mixing check starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from ._data import DataRecord
from ._graph import Graph
from ._groups import Groups
from ._nodes import shape_of
from ._views import VIEWS


@dataclass(frozen=True)
class Anchor:
    """An output of a node, and the axis of the examples.

    Attributes:
        node: the node.
        output: the number of its output.
        axis: the axis.
        partition: the number of the partition that the examples belong to.
    """

    node: Node
    output: int
    axis: int
    partition: int

    @property
    def edge(self) -> GradientEdge:
        """The output, as the engine takes it."""
        return GradientEdge(self.node, self.output)


def find_anchors(
    graph: Graph,
    outputs: Iterable[Tensor],
    dim: int,
    exact_dim: int | None,
    batches: Sequence[Groups],
    data: DataRecord,
    wanted: Iterable[int],
) -> list[Anchor]:
    """Return the outputs of the model, and what the loss is made of where these do not reach.

    Args:
        graph: the graph of the loss.
        outputs: the outputs of the model.
        dim: their batch dimension. If it has another size, the only dimension of the right size.
        exact_dim: their batch dimension, if the user gave it for outputs.
        batches: the partitions of the batch.
        data: outputs that are made of parameters only hold no batch.
        wanted: the indices of the nodes that the probes shall reach.
    """
    anchors = _of_outputs(graph, outputs, dim, exact_dim, batches, data)
    below = graph.below(*[graph.nodes.index(anchor.node) for anchor in anchors])
    if any(index not in below for index in wanted):
        further = _of_loss(graph, dim if exact_dim is None else exact_dim, batches)
        anchors += [one for one in further if graph.nodes.index(one.node) not in below]
    return anchors


def places(anchors: Iterable[Anchor], graph: Graph) -> list[tuple[int, int, int, int]]:
    """Return the node and the output of each anchor in a graph, its axis and its partition."""
    index_of = {node: index for index, node in enumerate(graph.nodes)}
    return [(index_of[one.node], one.output, one.axis, one.partition) for one in anchors]


def _of_outputs(
    graph: Graph,
    outputs: Iterable[Tensor],
    dim: int,
    exact_dim: int | None,
    batches: Sequence[Groups],
    data: DataRecord,
) -> list[Anchor]:
    """Return the outputs of the model that the loss is made of."""
    nodes = set(graph.nodes)
    anchors = []
    for tensor in outputs:
        node, output = tensor.grad_fn, tensor.output_nr
        if node is None or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        # A framework may return a copy, such as a cast to float32, of what the loss is made of.
        while node not in nodes and node.name() in VIEWS:
            node, output = node.next_functions[0]
            if node is None:
                break
        if node is None or node not in nodes or data.is_weight(node):
            continue
        found = _axis(shape_of(node, output), dim, exact_dim, batches)
        if found is not None:
            anchors.append(Anchor(node, output, *found))
    return list({(one.node, one.output): one for one in anchors}.values())


def _axis(
    shape: Sequence[int], dim: int, exact_dim: int | None, batches: Sequence[Groups]
) -> tuple[int, int] | None:
    for number, groups in enumerate(batches):
        if exact_dim is not None:
            if exact_dim < len(shape) and shape[exact_dim] == groups.examples:
                return exact_dim, number
            continue
        if dim < len(shape) and shape[dim] == groups.examples:
            return dim, number
        axes = [axis for axis, size in enumerate(shape) if size == groups.examples]
        if len(axes) == 1:
            return axes[0], number
    return None


# Nodes that add up terms, one for each of their inputs' elements.
_REDUCTIONS = frozenset((
    "BinaryCrossEntropyBackward0", "BinaryCrossEntropyWithLogitsBackward0", "CtcLossBackward0",
    "CtcLossBackward1", "HuberLossBackward0", "KlDivBackward0", "L1LossBackward0", "MeanBackward0",
    "MeanBackward1", "MseLossBackward0", "MultiMarginLossBackward0",
    "MultilabelMarginLossBackward0", "NllLoss2DBackward0", "NllLossBackward0",
    "SmoothL1LossBackward0", "SoftMarginLossBackward0", "SumBackward0", "SumBackward1",
))  # fmt: skip
_TERMS = frozenset((
    "AddBackward0", "DivBackward0", "MulBackward0", "NegBackward0", "StackBackward0",
    "SubBackward0", "CatBackward0",
))  # fmt: skip
_SOFTMAX = ("LogSoftmaxBackward0", "SoftmaxBackward0")


def _of_loss(graph: Graph, dim: int, batches: Sequence[Groups]) -> list[Anchor]:
    """Return the tensors that the loss is the sum or mean of, where their batch axis is plain.

    From the loss down, this passes sums of scalars, sums over elements, views and soft-maxima.
    These do not mix examples.

    Args:
        graph: the graph of the loss.
        dim: the batch dimension. A tensor that has another dimension of this size is no anchor.
        batches: the partitions of the batch.
    """
    anchors: list[Anchor] = []
    seen: set[tuple[int, int]] = set()
    stack = [(root, 0) for root in graph.roots]
    while stack:
        at = stack.pop()
        if at in seen:
            continue
        seen.add(at)
        index, output = at
        node, name = graph.nodes[index], str(graph.names[index])
        shape = shape_of(node, output)
        axes = [axis for axis, size in enumerate(shape) if size == batches[0].examples]
        scalar = all(size == 1 for size in shape)
        if axes == [dim] and not scalar:
            anchors.append(Anchor(node, output, dim, 0))
        elif (
            name in VIEWS
            or name in _REDUCTIONS
            or (name in _TERMS and scalar)
            or (name in _SOFTMAX and len(shape) == 2)
        ):
            stack += [entry for entry in graph.edges[index] if entry is not None]
    return anchors
