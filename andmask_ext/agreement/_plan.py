"""The plan of a backward pass: the nodes that use parameters, and their batch axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.autograd.graph import Node

from ._data import DataRecord, Origin
from ._formulas import axes_of
from ._graph import HIDDEN_DATA, LOOKUPS, RESHAPES, Graph, Operand
from ._groups import Groups
from ._layout import Code, Layout, fits
from ._nodes import has_hooks, rows_of, shape_of
from ._picks import PICKING, Pick, Single, follow
from ._reading import Evidences, Reader

_BATCH_NORMS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
CHECKPOINT = "CheckpointFunctionBackward"
_COMPILED = "CompiledFunctionBackward"
# The gradient of a term does not depend on the other terms.
_SUMS = frozenset((
    "AddBackward0", "CatBackward0", "RsubBackward0", "StackBackward0", "SubBackward0",
))  # fmt: skip
_LISTS = ("CatBackward0", "StackBackward0")


@dataclass(frozen=True)
class Consumer:
    """A node that joins parameters with data.

    Attributes:
        index: the index of the node.
        name: its type.
        operands: its inputs that are computed from parameters only.
        layouts: the batch axis of each of its outputs; None: it has none.
        unseen: no probe had a gradient here, so a gradient is an error.
        shared: the operands are terms of the loss. Each environment has them in full.
    """

    index: int
    name: str
    operands: tuple[Operand, ...]
    layouts: tuple[Layout | None, ...]
    unseen: bool = False
    shared: bool = False

    def at(self, graph: Graph, partitions: Sequence[Groups]) -> Consumer | None:
        """Return this consumer for a graph of other sizes; None: the plan must be made again."""
        node = graph.nodes[self.index]
        now: list[Layout | None] = []
        for output, layout in enumerate(self.layouts):
            if layout is not None:
                size = shape_of(node, output)[layout.axis]
                examples = partitions[layout.partition].examples
                if size != layout.size * examples:
                    if size % examples or (layout.before == 1) == (layout.after == 1):
                        return None
                    factor = size // examples
                    layout = (
                        replace(layout, after=factor)
                        if layout.before == 1
                        else replace(layout, before=factor)
                    )
            now.append(layout)
        operands = tuple(graph.operand(self.index, operand.edge) for operand in self.operands)
        return replace(self, operands=operands, layouts=tuple(now))


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
        batch: the partition of the examples that the loss is the mean of.
    """

    consumers: tuple[Consumer, ...]
    leaves: tuple[int, ...]
    deferred: bool
    certain: bool
    picks: tuple[Pick | Single, ...]
    contents: tuple[int, ...]
    batch: int = 0

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


def suspects(graph: Graph) -> list[int]:
    """Return the nodes whose batch axis must be known."""
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
        possible[index] = bool(below) and all(possible[child] for child in below)
        certain[index] = (
            bool(below)
            and all(certain[child] for child in below)
            and not graph.may_carry_batch(index)
        )
        if not certain[index] and any(possible[child] for child in below):
            indices.append(index)
    return indices


def _takes_statistics(node: Node) -> bool:
    return bool(getattr(node, "_saved_training", True))


def witnesses(graph: Graph, known: Sequence[int]) -> list[int]:
    """Return further nodes whose gradients tell where rows of the batch go."""
    found: set[int] = set()
    suspected = set(known)
    for index, name in enumerate(graph.names):
        if name in PICKING:
            found.add(index)
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
    check_mixing: bool,
) -> tuple[Plan, list[Groups]]:
    """Make the plan of a graph, and the partitions of this pass.

    Args:
        graph: the graph of a backward pass.
        batches: the partitions of the batch.
        evidences: the results of the mixing check.
        code: the powers of the environments; None: there is only one.
        data: what the nodes are made of.
        check_mixing: refuse nodes that no probe has reached.

    Raises:
        RuntimeError: the gradients of the environments cannot be computed exactly.
    """
    reader = Reader(graph, batches, evidences, code)
    weight = [False] * len(graph.nodes)
    consumers, leaves = [], []
    certain = True
    for index in graph.children_first():
        node, name = graph.nodes[index], graph.names[index]
        if isinstance(name, tuple):
            weight[index] = name[1] is not None
            if not weight[index]:
                leaves.append(index)
            continue
        if code is not None:
            _check_rows(node, index, reader, code)
        below = [weight[entry[0]] for entry in graph.edges[index] if entry]
        if any(below):
            _refuse_opaque(name)
            if all(below) and _is_weight(graph, index, reader, code, data):
                weight[index] = True
                for output in range(len(node._input_metadata)):
                    _refuse_hooks(node, name, output)
                continue
            if name in _BATCH_NORMS and code is not None and _takes_statistics(node):
                raise RuntimeError(
                    "Agreement: torch.nn.functional.batch_norm in training mode takes statistics "
                    "over all environments; use andmask_ext.nn.convert_batchnorm(model) with "
                    "layers, or andmask_ext.backward with one forward pass per environment"
                )
            consumer, alone = _consumer(graph, index, name, weight, reader, code, check_mixing)
            certain &= alone
            consumers.append(consumer)
        if name in PICKING and code is not None and not (below and below[0]):
            reader.pick(index)
    if any(weight[root] for root in graph.roots):
        raise RuntimeError(
            "Agreement: the loss, or one of several, is made of parameters only, so it belongs to "
            "no environment; add it to the loss of the data: `(loss + penalty).backward()`"
        )
    plan = Plan(
        tuple(consumers), tuple(leaves), CHECKPOINT in graph.names, certain,
        tuple(reader.picks), tuple(reader.unexplained),
    )  # fmt: skip
    return plan, reader.partitions


def refuse_compiled(graph: Graph) -> None:
    """Raise RuntimeError if a compiled function of the graph takes tracked parameters."""
    if _COMPILED not in graph.names:
        return
    for name, edges in zip(graph.names, graph.edges, strict=True):
        below = [entry[0] for entry in edges if entry is not None]
        if name == _COMPILED and any(graph.param(child) is not None for child in below):
            _refuse_opaque(_COMPILED)


def _refuse_opaque(name: str) -> None:
    """Raise RuntimeError if the uses of a node's parameters cannot be seen."""
    if name == _COMPILED:
        raise RuntimeError(
            "Agreement: the model, or a part of it that has parameters, was compiled with "
            "torch.compile, which hides the uses of parameters in its backward pass; call the "
            "original module (model._orig_mod) inside the context, or use andmask_ext.backward"
        )
    if name == CHECKPOINT:
        raise RuntimeError(
            "Agreement: a parameter is an argument of a function under reentrant "
            "checkpointing; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )


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


def _refuse_hooks(node: Node, name: str, output: int) -> None:
    if has_hooks(node, output):
        raise RuntimeError(
            f"Agreement: {name} has a hook (Tensor.register_hook), which would have to change the "
            "gradient of each environment; remove it, or use andmask_ext.backward"
        )


def _is_weight(
    graph: Graph, index: int, reader: Reader, code: Code | None, data: DataRecord
) -> bool:
    """Return whether no data enter a node, all of whose inputs are computed from parameters."""
    if not graph.may_carry_batch(index):
        return True
    if code is None:  # the only environment owns everything
        return False
    node, name = graph.nodes[index], str(graph.names[index])
    origin = data.of_node(node)
    if name in ("ExpandBackward0", "RepeatBackward0"):
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
    code: Code | None,
    check_mixing: bool,
) -> tuple[Consumer, bool]:
    """Return the consumer, and whether it holds for other gradients too."""
    edges = graph.edges[index]
    operands = tuple(
        graph.operand(index, edge) for edge, entry in enumerate(edges) if entry and weight[entry[0]]
    )
    outputs = len(graph.nodes[index]._input_metadata)
    reached = reader.evidence((index, 0)) is not None
    terms = all(math.prod(operand.shape) == 1 for operand in operands)
    if code is not None and not reached and terms:
        size = math.prod(reader.shape((index, 0)))
        single = size == 1
        if name in _SUMS and (single or (name in _LISTS and size == len(edges))):
            return Consumer(index, name, operands, (None,) * outputs, shared=True), True
        if single:
            raise RuntimeError(
                f"Agreement: a parameter is joined with the loss of the whole batch (at {name}), "
                "such as a learned weight of a loss, so the loss of each environment is needed "
                "there; multiply the losses of the examples before their mean is taken: "
                "`(weight * F.mse_loss(x, y, reduction='none').mean(1)).mean()`, or use "
                "andmask_ext.backward with one loss per environment"
            )
    axes = axes_of(name)
    for operand in operands:
        if axes_of(name, operand.edge) != axes:
            axes = axes_of(name, operand.edge)
    layouts: list[Layout | None] = []
    certain = True
    for output in range(outputs):
        at = (index, output)
        evidence = reader.evidence(at)
        layout, alone = reader.choose(at, axes)
        layouts.append(layout)
        if output > 0 and (evidence is None or not evidence.seen):
            continue  # not used
        if code is None:
            continue
        if 0 in reader.shape(at):  # as of an expert without rows
            certain = False
            continue
        certain &= alone and (evidence is None or evidence.seen)
        if layout is None or (check_mixing and evidence is None):
            shape, examples = reader.shape(at), reader.partitions[0].examples
            if evidence is not None and evidence.seen:
                message = _out_of_place if reader.is_apart(at, axes) else _mixing
                raise RuntimeError(message(name, shape, examples))
            raise RuntimeError(_not_found(name, shape, examples))
    unseen = reached and not reader.seen(index) and code is not None
    return Consumer(index, name, operands, tuple(layouts), unseen), certain


def _mixing(name: str, shape: Sequence[int], examples: int) -> str:
    return (
        f"Agreement: environments mix in the model: the gradient at {name} (output of shape "
        f"{tuple(shape)}, batch of {examples}) depends on examples of several environments; use "
        "andmask_ext.backward, with one forward pass per environment"
    )


def _out_of_place(name: str, shape: Sequence[int], examples: int) -> str:
    return (
        f"Agreement: environments mix in the model: the rows of {name} (output of shape "
        f"{tuple(shape)}, batch of {examples}) reach other environments than those of their place, "
        "and no index in the graph says why; if the model packs its examples into rows, pass the "
        "environment of each row; if it picks rows of its inputs and puts them back, call "
        "requires_grad_() on the inputs, so that autograd sees it; else use andmask_ext.backward, "
        "with one forward pass per environment"
    )


def _not_found(name: str, shape: Sequence[int], examples: int) -> str:
    return (
        f"Agreement: cannot tell where the batch of {examples} examples lies in the output of "
        f"{name}, of shape {tuple(shape)}; expected a model that is called inside the context and "
        "returns the tensors that the loss is computed from; if their batch is not in dimension "
        "batch_dim, pass Agreement(output_batch_dim=...); if the number of examples is not "
        f"{examples}, pass batch_size=... to the context, or the environment of each example; or "
        "use andmask_ext.backward"
    )
