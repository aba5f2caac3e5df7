"""The plan of a backward pass: the nodes that use parameters, and their batch axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.autograd.graph import Node

from ._constants import Constants
from ._formulas import axes_of
from ._graph import HIDDEN_DATA, LOOKUPS, Graph, Operand
from ._groups import Groups
from ._layout import Evidence, Layout, candidates, pick
from ._nodes import has_hooks, rows_of, saved_tensors, shape_of

_BATCH_NORMS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
CHECKPOINT = "CheckpointFunctionBackward"
_COMPILED = "CompiledFunctionBackward"

# By the index of a node: the evidence on each of its outputs.
Evidences = Mapping[int, list[Evidence]]


@dataclass(frozen=True)
class Consumer:
    """A node that joins parameters with data.

    Attributes:
        index: the index of the node.
        name: its type.
        operands: its inputs that are computed from parameters only.
        layouts: the batch axis of each of its outputs; None: it has none.
        unseen: no probe had a gradient here, so a gradient is an error.
    """

    index: int
    name: str
    operands: tuple[Operand, ...]
    layouts: tuple[Layout | None, ...]
    unseen: bool = False

    def at(self, graph: Graph, examples: int) -> Consumer | None:
        """Return this consumer for a graph of other sizes; None: the plan must be made again."""
        node = graph.nodes[self.index]
        now: list[Layout | None] = []
        for output, layout in enumerate(self.layouts):
            if layout is not None:
                size = shape_of(node, output)[layout.axis]
                if size != layout.before * examples * layout.after:
                    if size % examples or (layout.before == 1) == (layout.after == 1):
                        return None
                    factor = size // examples
                    layout = (
                        Layout(layout.axis, 1, factor)
                        if layout.before == 1
                        else Layout(layout.axis, factor, 1)
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
    """

    consumers: tuple[Consumer, ...]
    leaves: tuple[int, ...]
    deferred: bool
    certain: bool

    def fits(self, graph: Graph, examples: int) -> bool:
        """Return whether a graph of the same structure has the same sizes."""
        for consumer in self.consumers:
            layout = consumer.layouts[0]
            if layout is not None:
                size = shape_of(graph.nodes[consumer.index])[layout.axis]
                if size != layout.before * examples * layout.after:
                    return False
            for operand in consumer.operands:
                if shape_of(graph.nodes[operand.root], operand.output) != operand.shape:
                    return False
        return True

    def at(self, graph: Graph, examples: int) -> Plan | None:
        """Return this plan for a graph of other sizes; None: it must be made again."""
        consumers = [consumer.at(graph, examples) for consumer in self.consumers]
        resized = tuple(consumer for consumer in consumers if consumer is not None)
        return replace(self, consumers=resized) if len(resized) == len(consumers) else None


def _takes_statistics(node: Node) -> bool:
    return bool(getattr(node, "_saved_training", True))


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


def make_plan(
    graph: Graph,
    groups: Groups,
    evidences: Evidences,
    constants: Constants,
    check_mixing: bool,
) -> Plan:
    """Make the plan of a graph.

    Args:
        graph: the graph of a backward pass.
        groups: the environments.
        evidences: the results of the mixing check.
        constants: the tensors that are known to hold no data.
        check_mixing: refuse nodes that no probe has reached.

    Raises:
        RuntimeError: the gradients of the environments cannot be computed exactly.
    """
    weight = [False] * len(graph.nodes)
    consumers, leaves = [], []
    certain = True
    trivial = groups.environments == 1
    for index in graph.children_first():
        node, name = graph.nodes[index], graph.names[index]
        if isinstance(name, tuple):
            weight[index] = name[1] is not None
            if not weight[index]:
                leaves.append(index)
            continue
        evidence = evidences.get(index)
        if evidence is not None and not trivial:
            _check_rows(node, groups, evidence[0])
        below = [weight[entry[0]] for entry in graph.edges[index] if entry]
        if not any(below):
            continue
        if all(below) and (
            not graph.may_carry_batch(index)
            or (not trivial and _is_weight(graph, index, groups, evidence, constants))
        ):
            weight[index] = True
            for output in range(len(graph.nodes[index]._input_metadata)):
                _refuse_hooks(graph.nodes[index], name, output)
            continue
        if name == CHECKPOINT:
            raise RuntimeError(
                "Agreement: a parameter is an argument of a function under reentrant "
                "checkpointing; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        if name in _BATCH_NORMS and not trivial and _takes_statistics(node):
            raise RuntimeError(
                "Agreement: torch.nn.functional.batch_norm in training mode takes statistics over "
                "all environments; use andmask_ext.nn.convert_batchnorm(model) with layers, or "
                "andmask_ext.backward with one forward pass per environment"
            )
        layouts, alone = _layouts(graph, index, groups, weight, evidence, check_mixing)
        certain &= alone
        operands = tuple(
            graph.operand(index, edge)
            for edge, entry in enumerate(graph.edges[index])
            if entry and weight[entry[0]]
        )
        unseen = evidence is not None and not any(output.seen for output in evidence)
        consumers.append(Consumer(index, name, operands, layouts, unseen and not trivial))
    for root in graph.roots:
        if weight[root]:
            raise RuntimeError(
                "Agreement: a term of the loss is made of parameters only: it belongs to no "
                "environment; use weight_decay, or add its gradient outside of the context"
            )
    return Plan(tuple(consumers), tuple(leaves), CHECKPOINT in graph.names, certain)


def _check_rows(node: Node, groups: Groups, evidence: Evidence) -> None:
    """Raise RuntimeError if a layer has taken rows for those of other environments."""
    rows = rows_of(node)
    if rows is None or not evidence.seen:
        return
    if not any(
        layout.axis == 0 and torch.equal(layout.spread(groups.ids), rows)
        for layout in evidence.left
    ):
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


def refuse_compiled(graph: Graph) -> None:
    """Raise RuntimeError if a part of the graph was compiled."""
    if _COMPILED in graph.names:
        raise RuntimeError(
            "Agreement: the model, or a part of it, was compiled with torch.compile, which "
            "hides the uses of parameters in its backward pass; call the original module "
            "(model._orig_mod) inside the context, or use andmask_ext.backward"
        )


def _shapes(node: Node) -> list[tuple[int, ...]]:
    return [shape_of(node, output) for output in range(len(node._input_metadata))]


def _is_weight(
    graph: Graph,
    index: int,
    groups: Groups,
    evidence: list[Evidence] | None,
    constants: Constants,
) -> bool:
    """Return whether a node's output depends on parameters only and has no batch axis."""
    node, name = graph.nodes[index], graph.names[index]
    assert isinstance(name, str)
    shapes = _shapes(node)
    if not any(candidates(shape, groups.examples, axes_of(name)) for shape in shapes):
        return True
    constant = _is_constant(graph, index, shapes[0], constants)
    if name in HIDDEN_DATA and graph.is_table(index):
        return True
    if evidence is None or not any(output.seen for output in evidence):
        return constant and name not in LOOKUPS
    if not any(output.left for output in evidence if output.seen):
        return constant
    # The gradients look like rows of the batch. Look-ups of constant lines may be such rows, for
    # example of token types. Arithmetic with a constant cannot.
    return constant and name in _KEEPING


# Arithmetic that saves both its operands.
_KEEPING = frozenset((
    "AddmmBackward0", "BmmBackward0", "DivBackward0", "DotBackward0", "MmBackward0",
    "MulBackward0", "MvBackward0",
))  # fmt: skip
_FILLING = frozenset(("MaskedFillBackward0", "MaskedFillBackward1", "WhereBackward0"))


def _is_constant(graph: Graph, index: int, shape: tuple[int, ...], constants: Constants) -> bool:
    """Return whether all inputs of a node other than parameters are known to hold no data."""
    name, node = graph.names[index], graph.nodes[index]
    if name in ("ExpandBackward0", "RepeatBackward0"):
        return True
    if name in ("AddBackward0", "SubBackward0"):  # with a constant of the same shape
        return [shape_of(graph.nodes[e[0]], e[1]) for e in graph.edges[index] if e] == [shape]
    whole = name in LOOKUPS or name in _KEEPING
    if not (whole or (name in _FILLING and None not in graph.edges[index])):
        return False
    return all(
        tensor.requires_grad or tensor.dim() == 0 or tensor in constants
        for tensor in saved_tensors(node)
    )


def _layouts(
    graph: Graph,
    index: int,
    groups: Groups,
    weight: Sequence[bool],
    evidence: list[Evidence] | None,
    check_mixing: bool,
) -> tuple[tuple[Layout | None, ...], bool]:
    """Return the batch axis of each output, and whether it holds for other gradients too."""
    name, node = graph.names[index], graph.nodes[index]
    assert isinstance(name, str)
    trivial = groups.environments == 1
    layouts: list[Layout | None] = []
    certain = True
    for output, shape in enumerate(_shapes(node)):
        seen = None if evidence is None else evidence[output]
        axes = axes_of(name)
        for edge, entry in enumerate(graph.edges[index]):
            if entry and weight[entry[0]] and axes_of(name, edge) != axes:
                axes = axes_of(name, edge)
        layout, alone = pick(seen, shape, groups.examples, axes, trivial)
        layouts.append(layout)
        if output > 0 and (seen is None or not seen.seen):
            continue  # not used
        if trivial:
            continue  # the only environment owns everything
        certain &= alone and (seen is None or seen.seen)
        if layout is None and seen is not None and candidates(shape, groups.examples, None):
            raise RuntimeError(
                f"Agreement: environments mix in the model: the gradient at {name} (output of "
                f"shape {shape}) depends on examples of other environments, or its rows are not "
                f"those of the batch of {groups.examples}; use andmask_ext.backward, with one "
                "forward pass per environment (if a parameter is combined with a constant here, "
                "register the constant as a buffer)"
            )
        if layout is None and math.prod(shape) == 1:
            raise RuntimeError(
                f"Agreement: a term of the loss is made of parameters only (it enters at {name}): "
                "it belongs to no environment; use weight_decay, or add its gradient outside of "
                "the context"
            )
        if layout is None or (check_mixing and seen is None):
            raise RuntimeError(
                f"Agreement: cannot tell where the batch of {groups.examples} examples lies in the "
                f"output of {name}, of shape {shape}; expected a model that is called inside the "
                "context and returns the tensors that the loss is computed from, with the batch in "
                "dimension batch_dim; or pass check_mixing='never' if environments do not mix and "
                "shapes leave one possibility; or use andmask_ext.backward"
            )
    return tuple(layouts), certain
