"""The plan of a backward pass: the nodes that use parameters, and their batch axes."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

from torch.autograd.graph import Node

from ._consumer import Consumer
from ._data import DataRecord, Origin
from ._flows import UNKNOWN, At, Entrance, Flows
from ._formulas import axes_of
from ._graph import CHECKPOINT, COPY_SLICES, HIDDEN_DATA, LOOKUPS, RESHAPES, Graph
from ._groups import Groups
from ._layout import Code, Layout, fits
from ._moves import Moves
from ._nodes import rows_of, shape_of
from ._picks import COPIES, JOINS, PICKING, Move, broadcast, follow, summed
from ._reading import Evidences, Reader
from ._refusals import (
    BATCH_NORM,
    learned_weight,
    mixing,
    not_found,
    out_of_place,
    refuse_hooks,
    refuse_opaque,
)
from ._views import VIEWS

_BATCH_NORMS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
# The gradient of a term does not depend on the other terms.
_SUMS = frozenset((
    "AddBackward0", "CatBackward0", "RsubBackward0", "StackBackward0", "SubBackward0",
))  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The treatment of a graph.

    Attributes:
        consumers: the nodes that use tracked parameters.
        leaves: the indices of the untracked leaves, which get plain gradients.
        deferred: functions in the graph run backward passes (reentrant checkpointing).
        certain: whether the plan holds for any backward pass of the same structure.
        picks: the nodes that pick rows of data, see :func:`follow`.
        contents: the nodes that must pick the same rows if the plan is to hold.
        apart: whether environments are proved to be apart in what enters regions that hide nodes.
        quiet: outputs of nodes where no probe had a gradient. The plan holds while there is none.
        batch: the partition of the examples that the loss is the mean of.
    """

    consumers: tuple[Consumer, ...]
    leaves: tuple[int, ...]
    deferred: bool
    certain: bool
    picks: tuple[Move, ...]
    contents: tuple[int, ...]
    apart: bool
    quiet: tuple[At, ...] = ()
    batch: int = 0

    @property
    def moves(self) -> bool:
        """Whether nodes move rows of data."""
        return bool(self.picks or self.contents)

    def partitions(self, graph: Graph, batches: Sequence[Groups]) -> list[Groups] | None:
        """Return the partitions of rows of a pass; None: the plan does not hold for it."""
        return follow(self.picks, graph, batches)

    def fits(self, graph: Graph, partitions: Sequence[Groups]) -> bool:
        """Return whether a graph of the same structure has the same sizes."""
        for consumer in self.consumers:
            layout = consumer.layouts[0]
            if layout is not None:
                size = shape_of(graph.nodes[consumer.index])[layout.axis]
                if size != layout.size * partitions[layout.partition].examples:
                    return False
            for operand in consumer.operands:
                if shape_of(graph.nodes[operand.root], operand.output) != operand.shape:
                    return False
        return True

    def at(self, graph: Graph, partitions: Sequence[Groups]) -> Plan | None:
        """Return this plan for a graph of other sizes; None: it must be made again."""
        consumers = [consumer.at(graph, partitions) for consumer in self.consumers]
        resized = tuple(consumer for consumer in consumers if consumer is not None)
        return replace(self, consumers=resized) if len(resized) == len(consumers) else None


def suspects(graph: Graph, data: DataRecord) -> tuple[list[int], list[int]]:
    """Return the nodes whose batch axis must be known, and further ones that tell where rows go.

    Args:
        graph: the graph of a backward pass.
        data: what the nodes are made of.
    """
    possible = [False] * len(graph.nodes)  # computed from parameters only, if no data enters
    certain = [False] * len(graph.nodes)  # computed from parameters only
    indices = []
    for index in graph.children_first():
        if graph.param(index) is not None:
            possible[index] = certain[index] = True
            continue
        if rows_of(graph.nodes[index]) is not None:
            indices.append(index)
            continue
        below = [entry[0] for entry in graph.edges[index] if entry]
        apart = bool(below) and not _takes_data(graph, index, data)
        possible[index] = apart and all(possible[child] for child in below)
        certain[index] = (
            apart and all(certain[child] for child in below) and not graph.may_carry_batch(index)
        )
        if not certain[index] and any(possible[child] for child in below):
            indices.append(index)
    return indices, [i for i in _witnesses(graph, indices) if not certain[i]]


def _takes_data(graph: Graph, index: int, data: DataRecord) -> bool:
    """Return whether data are known to enter a node."""
    name = graph.names[index]
    views = name in VIEWS or name in COPIES  # these take the shape of data only
    return not views and data.is_data(graph.nodes[index])


def _takes_statistics(node: Node) -> bool:
    return bool(getattr(node, "_saved_training", True))


def _witnesses(graph: Graph, known: Sequence[int]) -> list[int]:
    """Return further nodes whose gradients tell where rows go."""
    found: set[int] = set()
    suspected = set(known)
    for index, name in enumerate(graph.names):
        if broadcast(graph, index):
            found.add(index)
        sums = summed(graph, index)
        if name in PICKING or name in JOINS or sums:
            found |= set() if sums else {index}
            found |= {entry[0] for entry in graph.edges[index] if entry is not None}
        elif name in RESHAPES:
            entry = graph.edges[index][0]
            if entry is not None and entry[0] in suspected:
                found.add(index)
    return sorted(i for i in found - suspected if not isinstance(graph.names[i], tuple))


def make_plan(
    graph: Graph,
    batches: Sequence[Groups],
    evidences: Evidences,
    code: Code | None,
    data: DataRecord,
    entrance: Entrance,
    anchors: Sequence[tuple[int, int, int, int]],
    batch_dim: int,
    check_mixing: bool,
) -> tuple[Plan, list[Groups]]:
    """Make the plan of a graph, and the partitions of this pass.

    Args:
        graph: the graph of a backward pass.
        batches: the partitions of the batch.
        evidences: the results of the mixing check.
        code: the powers of the environments; None: there is only one.
        data: what the nodes are made of.
        entrance: how data come into the graph.
        anchors: the node and number of each output of the model, its batch axis and partition.
        batch_dim: the batch dimension of the model.
        check_mixing: refuse nodes that no probe has reached.

    Raises:
        RuntimeError: the gradients of the environments cannot be computed exactly.
    """
    flows = Flows(graph, entrance)
    reader = Reader(graph, batches, evidences, code, flows, data, batch_dim)
    moves = Moves(graph, reader, flows)
    weight = [False] * len(graph.nodes)
    consumers, leaves = [], []
    certain = True
    everything = set(range(len(graph.nodes)))
    loss = everything - graph.below(*(at[0] for at in anchors)) if anchors else set()
    for index in graph.children_first():
        node, name = graph.nodes[index], graph.names[index]
        weight[index] = graph.param(index) is not None
        if not weight[index]:
            flows.enter(index, weight, data)
            if isinstance(name, tuple) and node not in data.shown:
                leaves.append(index)
        if isinstance(name, tuple):
            reader.prove_leaf(index)
            continue
        if code is not None:
            _check_rows(node, index, reader, code)
        below = [weight[entry[0]] for entry in graph.edges[index] if entry]
        if any(below):
            refuse_opaque(name)
            if all(below) and _is_weight(graph, index, reader, code, data):
                weight[index] = True
                for output in range(len(node._input_metadata)):
                    refuse_hooks(node, name, output)
                continue
            if name in _BATCH_NORMS and code is not None and _takes_statistics(node):
                raise RuntimeError(BATCH_NORM)
            consumer, alone = _consumer(
                graph, index, name, weight, reader, moves, code, check_mixing, loss
            )
            certain &= alone
            consumers.append(consumer)
        if index in loss:  # what it does with rows is no part of the model
            continue
        if graph.holds_indices(index) and flows.inputs(index):
            moves.unexplained.append(index)
        if name in PICKING and code is not None and not (below and below[0]):
            entry = graph.edges[index][0]
            shown = entry is not None and graph.nodes[entry[0]] in data.shown
            moves.pick(index, shown)
        if name in JOINS and code is not None:
            moves.join(index, weight)
        if name == COPY_SLICES:
            moves.fill(index)
        if moves.sums(index, weight):
            certain = False  # values tell which rows are joined
            for output in range(len(node._input_metadata)):
                flows.move((index, output), UNKNOWN)
    for index, output, axis, partition in anchors:
        at = (index, output)
        if not weight[index] and not moves.settle(at, Layout(axis, 1, 1, partition)):
            certain = False
    if any(weight[root] for root in graph.roots):
        raise RuntimeError(
            "Agreement: the loss, or one of several, is made of parameters only, so it belongs to "
            "no environment; add it to the loss of the data: `(loss + penalty).backward()`"
        )
    deferred = CHECKPOINT in graph.names
    plan = Plan(
        tuple(consumers), tuple(leaves), deferred, certain, tuple(moves.found),
        tuple(moves.unexplained), flows.regions_are_proved(),
    )  # fmt: skip
    if deferred and plan.moves:  # the region does not see which rows were moved
        plan = replace(plan, certain=False)
    return plan, reader.partitions


def _check_rows(node: Node, index: int, reader: Reader, code: Code) -> None:
    """Raise RuntimeError if a layer has taken rows for those of other environments."""
    rows, evidence = rows_of(node), reader.evidence((index, 0))
    if rows is None or evidence is None or not evidence.seen:
        return
    ids = evidence.ids(0, code)
    if ids is None or not fits(rows, ids):
        raise RuntimeError(
            "Agreement: expected the rows of each example one after the other in the input of a "
            "layer of convert_batchnorm, but they lie in another order, or environments mix after "
            "it; use andmask_ext.backward with one forward pass per environment"
        )


def _is_weight(
    graph: Graph, index: int, reader: Reader, code: Code | None, data: DataRecord
) -> bool:
    """Return whether no data enter a node, all of whose inputs are computed from parameters."""
    if _takes_data(graph, index, data):
        return False
    if not graph.may_carry_batch(index):
        return True
    if code is None:  # the only environment owns everything
        return False
    node, name = graph.nodes[index], str(graph.names[index])
    origin = data.of_node(node)
    if name in COPIES:
        origin = Origin.FREE
    if origin == Origin.FREE and name not in HIDDEN_DATA:
        return True
    if origin >= Origin.HIDDEN:
        return False
    if name in HIDDEN_DATA and graph.is_table(index):
        return True
    outputs = [(index, output) for output in range(len(node._input_metadata))]
    if not reader.seen(index):
        possible = any(reader.possible(at, axes_of(name)) for at in outputs)
        return origin == Origin.FREE or not possible or name not in LOOKUPS
    # Look-ups of constant lines, such as token types, may be rows of the batch.
    return not any(
        (evidence := reader.evidence(at)) is not None
        and evidence.seen
        and reader.layouts(at, axes_of(name))
        for at in outputs
    )


def _consumer(
    graph: Graph,
    index: int,
    name: str,
    weight: Sequence[bool],
    reader: Reader,
    moves: Moves,
    code: Code | None,
    check_mixing: bool,
    loss: Container[int],
) -> tuple[Consumer, bool]:
    """Return the consumer, and whether it holds for other gradients too."""
    edges = graph.edges[index]
    operands = tuple(
        graph.operand(index, edge) for edge, entry in enumerate(edges) if entry and weight[entry[0]]
    )
    outputs = len(graph.nodes[index]._input_metadata)
    reached = reader.evidence((index, 0)) is not None
    terms = all(math.prod(operand.shape) == 1 for operand in operands)
    if code is not None and not reached:
        size = math.prod(reader.shape((index, 0)))
        single = size == 1
        if terms and name in _SUMS and (single or (name in JOINS and size == len(edges))):
            return Consumer(index, name, operands, (None,) * outputs, shared=True), True
        if single or (index in loss and not reader.possible((index, 0), None)):
            raise RuntimeError(learned_weight(name))
    axes = axes_of(name)
    for operand in operands:
        if axes_of(name, operand.edge) != axes:
            axes = axes_of(name, operand.edge)
    layouts: list[Layout | None] = []
    certain, unseen = True, False
    for output in range(outputs):
        at = (index, output)
        evidence, shape = reader.evidence(at), reader.shape(at)
        layout, alone = reader.choose(at, axes)
        if code is not None and layout is not None:
            alone = alone and moves.settle(at, layout)
        layouts.append(layout)
        seen = evidence is not None and evidence.seen
        if code is None or (output > 0 and not seen):  # not used
            continue
        if not seen and output == 0:
            unseen = reached and not alone and not reader.seen(index)
        certain &= alone or unseen
        crossed = seen and layout is not None and moves.crosses(at, layout)
        if crossed or (seen and layout is None):
            message = out_of_place if reader.is_apart(at, axes) else mixing
            raise RuntimeError(message(name, shape, reader.partitions[0].examples))
        if not reached and (layout is None or check_mixing):
            raise RuntimeError(not_found(name, shape, reader.partitions[0].examples))
    quiet = tuple(reader.quiet.get((index, output)) for output in range(outputs))
    views = tuple(reader.view_of((index, o), layout) for o, layout in enumerate(layouts))
    return Consumer(index, name, operands, tuple(layouts), unseen, quiet, views=views), certain
