"""Which nodes of a backward pass use parameters, and how each is treated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.autograd.graph import Node

from ._consumers import FORMULAS, axes_of
from ._graph import LOOKUPS, Graph, Operand
from ._groups import Groups
from ._layout import Evidence, Layout, candidates, pick
from ._nodes import saved, shape_of

_BATCH_NORMS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
CHECKPOINT = "CheckpointFunctionBackward"
_COMPILED = "CompiledFunctionBackward"

# By the index of a node: what probes have shown of each of its outputs.
Evidences = Mapping[int, list[Evidence]]


@dataclass(frozen=True)
class Consumer:
    """A node that joins parameters with data.

    Attributes:
        index: of the node.
        name: its type.
        operands: its inputs that are made of parameters only.
        layouts: where the batch lies in each of its outputs; None: nowhere.
    """

    index: int
    name: str
    operands: tuple[Operand, ...]
    layouts: tuple[Layout | None, ...]

    def at(self, node: Node, examples: int) -> Consumer | None:
        """Return this consumer in a graph of other sizes; None: it has to be found anew."""
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
        return replace(self, layouts=tuple(now))


@dataclass(frozen=True)
class Plan:
    """What to do with a graph.

    Attributes:
        consumers: the nodes that use tracked parameters.
        leaves: the indices of the leaves that are not tracked: they get plain gradients.
        deferred: functions in the graph run backward passes of their own (checkpointing).
        certain: whether another backward pass of the same structure can be treated alike.
    """

    consumers: tuple[Consumer, ...]
    leaves: tuple[int, ...]
    deferred: bool
    certain: bool

    def at(self, nodes: Sequence[Node], examples: int) -> Plan | None:
        """Return this plan for a graph of other sizes; None: it has to be made anew."""
        consumers = [one.at(nodes[one.index], examples) for one in self.consumers]
        found = tuple(one for one in consumers if one is not None)
        return replace(self, consumers=found) if len(found) == len(consumers) else None


def suspects(graph: Graph) -> list[int]:
    """Return the nodes of which it has to be known where the batch lies in their outputs."""
    possible = [False] * len(graph.nodes)  # made of parameters only, if no data enters
    certain = [False] * len(graph.nodes)  # made of parameters only
    found = []
    for index in graph.children_first():
        if graph.param(index) is not None:
            possible[index] = certain[index] = True
            continue
        below = [entry[0] for entry in graph.edges[index] if entry]
        possible[index] = bool(below) and all(possible[child] for child in below)
        certain[index] = (
            bool(below)
            and all(certain[child] for child in below)
            and not graph.may_carry_batch(index)
        )
        if not certain[index] and any(possible[child] for child in below):
            found.append(index)
    return found


def make_plan(
    graph: Graph,
    groups: Groups,
    evidences: Evidences,
    batch_norms: Sequence[str],
    inputs: set[int],
) -> Plan:
    """Decide what each node of a graph is.

    Args:
        graph: of a backward pass.
        groups: the environments.
        evidences: what probes have shown.
        batch_norms: names of the modules that would use statistics of the batch.
        inputs: the memory that the model's inputs lie in (see :func:`storage`).

    Raises:
        RuntimeError: it cannot be done exactly.
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
        _refuse(node, name, batch_norms, groups)
        below = [weight[entry[0]] for entry in graph.edges[index] if entry]
        if not any(below):
            continue
        evidence = evidences.get(index)
        if all(below) and (
            not graph.may_carry_batch(index)
            or (not trivial and _is_weight(graph, index, groups, evidence, inputs))
        ):
            weight[index] = True
            continue
        certain &= evidence is None or all(one.seen for one in evidence)
        layouts = _layouts(graph, index, groups, evidence, trivial)
        operands = tuple(
            graph.operand(index, edge)
            for edge, entry in enumerate(graph.edges[index])
            if entry and weight[entry[0]]
        )
        consumers.append(Consumer(index, name, operands, layouts))
    return Plan(tuple(consumers), tuple(leaves), CHECKPOINT in graph.names, certain)


def _refuse(node: Node, name: str, batch_norms: Sequence[str], groups: Groups) -> None:
    if name == _COMPILED:
        raise RuntimeError(
            "Agreement: the model, or a part of it, was compiled with torch.compile: what its "
            "backward pass does to parameters cannot be seen; call the module that was compiled "
            "(model._orig_mod) inside the context, or use andmask_ext.backward"
        )
    if name in _BATCH_NORMS and (name != _BATCH_NORMS[0] or saved(node, "training")):
        if groups.environments == 1 or shape_of(node)[0] == 1:  # instance norm has a batch of 1
            return
        where = ", ".join(batch_norms) or "torch.nn.functional.batch_norm"
        raise RuntimeError(
            f"Agreement: {where} in training mode takes statistics over all environments; "
            "convert the model with andmask_ext.nn.convert_batchnorm(model), which takes them in "
            "each environment, or use andmask_ext.backward with one forward pass per environment"
        )


def storage(tensor: Tensor) -> int:
    """Return the address of the memory that a tensor is a view of."""
    return tensor.untyped_storage().data_ptr()


def _shapes(node: Node) -> list[tuple[int, ...]]:
    return [shape_of(node, output) for output in range(len(node._input_metadata))]


def _is_weight(
    graph: Graph,
    index: int,
    groups: Groups,
    evidence: list[Evidence] | None,
    inputs: set[int],
) -> bool:
    """Return whether a node makes something of parameters that carries no batch."""
    node, name = graph.nodes[index], graph.names[index]
    assert isinstance(name, str)
    shapes = _shapes(node)
    if not any(candidates(shape, groups.examples, axes_of(name)) for shape in shapes):
        return True
    if evidence is not None and any(one.seen for one in evidence):
        rows = any(one.left for one in evidence if one.seen)
        return not rows and _is_constant(graph, index, shapes[0], inputs)
    return evidence is None and _is_arithmetic(graph, index, shapes[0])


def _is_constant(graph: Graph, index: int, shape: tuple[int, ...], inputs: set[int]) -> bool:
    """Return whether what enters a node beside parameters is not the batch."""
    name = graph.names[index]
    if name in LOOKUPS:
        indices = saved(graph.nodes[index], LOOKUPS[name])  # type: ignore[index]
        tensors = indices if isinstance(indices, (list, tuple)) else [indices]
        return not any(t is not None and storage(t) in inputs for t in tensors)
    return name in ("ExpandBackward0", "RepeatBackward0") or _is_arithmetic(graph, index, shape)


def _is_arithmetic(graph: Graph, index: int, shape: tuple[int, ...]) -> bool:
    """Return whether a node joins a parameter with a constant of the same shape: a mask, say."""
    if graph.names[index] not in ("AddBackward0", "DivBackward0", "MulBackward0", "SubBackward0"):
        return False
    return [shape_of(graph.nodes[e[0]], e[1]) for e in graph.edges[index] if e] == [shape]


def _layouts(
    graph: Graph,
    index: int,
    groups: Groups,
    evidence: list[Evidence] | None,
    trivial: bool,
) -> tuple[Layout | None, ...]:
    name = graph.names[index]
    assert isinstance(name, str)
    layouts: list[Layout | None] = []
    for output, shape in enumerate(_shapes(graph.nodes[index])):
        seen = None if evidence is None else evidence[output]
        layout = pick(seen, shape, groups.examples, axes_of(name), trivial)
        layouts.append(layout)
        if layout is not None or (output > 0 and (seen is None or not seen.seen)):
            continue
        if seen is not None and seen.seen and not seen.left:
            raise RuntimeError(
                f"Agreement: environments mix in the model: the gradient at {name} (output of "
                f"shape {shape}) depends on examples of other environments, or its rows are not "
                f"those of the batch of {groups.examples}; use andmask_ext.backward, with one "
                "forward pass per environment"
            )
        raise RuntimeError(
            f"Agreement: cannot tell where the batch of {groups.examples} examples lies in the "
            f"output of {name}, of shape {shape}; expected a model whose output holds the batch "
            "in dimension batch_dim, and which is called inside the context; "
            "or use andmask_ext.backward"
        )
    return tuple(layouts)
