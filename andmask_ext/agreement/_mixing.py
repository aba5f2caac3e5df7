"""The mixing check: whether environments mix, and which environment each row belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ._anchors import Anchor
from ._data import DataRecord
from ._engine import Engine
from ._flows import At
from ._formulas import axes_of
from ._graph import Graph
from ._groups import Groups
from ._layout import Code, Evidence
from ._nodes import leaf, shape_of
from ._picks import PICKING
from ._plan import suspects
from ._reading import Evidences
from ._refusals import is_donated, refuse_donated


class OtherRegion(Exception):
    """A region under reentrant checkpointing is not what it was in the mixing check."""


class MixingCheck:
    """Runs probes: backward passes from the anchors that fill :class:`Evidence`.

    Args:
        engine: runs backward passes.
        data: what the nodes are made of.

    Attributes:
        running: whether a probe is under way.
        moves_inside: whether a backward pass inside a probe had nodes that pick rows.
    """

    def __init__(self, engine: Engine, data: DataRecord) -> None:
        self.running = False
        self.moves_inside = False
        self._engine = engine
        self._data = data
        self._probe = 0
        self._near = False  # stay above what is made of data only
        self._inner = 0  # number of backward passes inside this one
        self._by_pass: dict[int, dict[int, list[Evidence]]] = {}
        self._evidence: dict[int, list[Evidence]] = {}
        self._quiet: dict[int, list[At]] = {}  # by pass: outputs without a gradient

    def evidence(self, inner: int) -> Evidences:
        """Return the evidence on the nodes of a graph, by the index of the node.

        Args:
            inner: 0 for the graph given to :meth:`find`, else the number of the backward pass
                inside it.
        """
        return self._by_pass.get(inner, {}) if inner else self._evidence

    def quiet(self, inner: int) -> list[At]:
        """Return the outputs of nodes where no probe had a gradient, but a node above had one.

        Args:
            inner: as for :meth:`evidence`.
        """
        return self._quiet.get(inner, [])

    def find(
        self,
        graph: Graph,
        anchors: Sequence[Anchor],
        tracked: dict[int, int],
        batches: Sequence[Groups],
        code: Code | None,
        data: list[Tensor],
    ) -> None:
        """Run the probes.

        Args:
            graph: the graph of the backward pass that follows.
            anchors: where the probes start.
            tracked: the numbers of the parameters, by id.
            batches: the partitions of the batch.
            code: the powers of the environments; None: there is only one.
            data: the leaves that hold data. Their ``.grad`` changes.
        """
        self._by_pass, self._evidence, self._quiet, self.moves_inside = {}, {}, {}, False
        if code is None or not anchors:
            return
        probe = Graph([anchor.node for anchor in anchors], tracked)
        self.running, self._near = True, False
        try:
            self._probes(probe, anchors, batches, code, data)
        except RuntimeError:
            if not data:
                raise
            # What is made of data only need not have a backward pass: do without.
            self._by_pass, self._near = {}, True
            self._probes(probe, anchors, batches, code, [])
        finally:
            self.running = False
        index_of = {node: index for index, node in enumerate(graph.nodes)}
        self._evidence = {
            index_of[probe.nodes[index]]: seen
            for index, seen in self._by_pass[0].items()
            if probe.nodes[index] in index_of
        }
        self._quiet[0] = [
            (index_of[probe.nodes[index]], output)
            for index, output in self._quiet.get(0, ())
            if probe.nodes[index] in index_of
        ]

    def is_quiet(
        self, graph: Graph, roots: Sequence[Any], grads: list[Tensor], quiet: Sequence[At]
    ) -> bool:
        """Return whether a backward pass has no gradient but zero at some outputs of nodes.

        Args:
            graph: the graph of the pass. It is kept.
            roots: its roots.
            grads: their gradients.
            quiet: the outputs.
        """
        if any(map(is_donated, graph.nodes)):  # of a loss, say; no second pass can run
            return False
        watch = _Watch(graph, {index for index, _ in quiet})
        self.running = True
        try:
            edges = [GradientEdge(graph.nodes[index], 0) for index in watch.nodes]
            self._engine(graph, roots, grads, True, edges)
        finally:
            self.running = False
            watch.close()
        return not watch.loud.intersection(quiet)

    def _probes(
        self,
        probe: Graph,
        anchors: Sequence[Anchor],
        batches: Sequence[Groups],
        code: Code,
        data: list[Tensor],
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        noise = [_noise(anchor, generator) for anchor in anchors]
        edges = [anchor.edge for anchor in anchors]
        for number, powers in enumerate([None, *code.exponents]):
            self._inner, self._probe = 0, number
            grads = noise
            if powers is not None:
                factors = torch.pow(2.0, powers).double()
                grads = [
                    _along(values, anchor.axis, factors[batches[anchor.partition].ids])
                    for values, anchor in zip(noise, anchors, strict=True)
                ]
            self._pass(probe, edges, grads, self._by_pass.setdefault(0, {}), data)

    def inner_pass(self, graph: Graph, roots: Sequence[Any], grads: list[Tensor]) -> None:
        """Run a backward pass inside a probe (reentrant checkpointing)."""
        self._inner += 1
        self.moves_inside |= any(name in PICKING for name in graph.names)
        leaves = [leaf(n) for i, n in enumerate(graph.nodes) if graph.is_untracked_leaf(i)]
        self._pass(graph, roots, grads, self._by_pass.setdefault(self._inner, {}), leaves)

    def _pass(
        self,
        graph: Graph,
        roots: Sequence[Any],
        grads: list[Tensor],
        evidences: dict[int, list[Evidence]],
        leaves: list[Tensor],
    ) -> None:
        refuse_donated(graph)
        handles, inputs = list[Any](), list[Any](leaves)

        def make_hook(index: int) -> Callable[[tuple[Tensor | None, ...]], None]:
            def hook(deltas: tuple[Tensor | None, ...]) -> None:
                for evidence, delta in zip(evidences[index], deltas, strict=True):
                    if delta is not None:
                        evidence.add(delta, self._probe)

            return hook

        wanted = {id(tensor) for tensor in leaves}
        for index, node in enumerate(graph.nodes):
            tensor = leaf(node) if graph.is_untracked_leaf(index) else None
            # A hook of the user would see the probes.
            if tensor is not None and id(tensor) in wanted and not tensor._backward_hooks:
                evidences.setdefault(index, [Evidence(tensor.shape, None)])
                into = make_hook(index)
                handles.append(tensor.register_hook(lambda delta, into=into: into((delta,))))
        found, witnesses = suspects(graph, self._data)
        for index in [*found, *([] if self._near else witnesses)]:
            node, name = graph.nodes[index], str(graph.names[index])
            if index not in evidences:
                evidences[index] = [
                    Evidence(shape_of(node, output), axes_of(name))
                    for output in range(len(node._input_metadata))
                ]
            handles.append(node.register_prehook(make_hook(index)))
            inputs.append(GradientEdge(node, 0))
        inner = self._inner
        first = self._probe == 0 and inner not in self._quiet
        watch = _Watch(graph, range(len(graph.nodes)) if first else ())
        try:
            if inputs:
                self._engine(graph, roots, grads, True, inputs)
        finally:
            watch.close()
            for handle in handles:
                handle.remove()
        if first:
            self._quiet[inner] = watch.quiet(evidences)


class _Watch:
    """Sees which outputs of nodes have a gradient that is not zero, or no elements.

    Args:
        graph: the graph of a backward pass.
        nodes: the indices of the nodes to watch; leaves are left out.

    Attributes:
        nodes: these nodes.
        loud: the outputs that had such a gradient.
    """

    def __init__(self, graph: Graph, nodes: Iterable[int]) -> None:
        self.nodes = sorted(index for index in nodes if not isinstance(graph.names[index], tuple))
        self.loud: set[At] = set()
        self._graph = graph
        self._handles = [
            graph.nodes[index].register_prehook(partial(self._see, index)) for index in self.nodes
        ]

    def _see(self, index: int, deltas: tuple[Tensor | None, ...]) -> None:
        for output, delta in enumerate(deltas):
            at = (index, output)
            if delta is not None and at not in self.loud and (delta.numel() == 0 or delta.any()):
                self.loud.add(at)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def quiet(self, reached: Iterable[int]) -> list[At]:
        """Return the other outputs that a node uses which had a gradient.

        What is above none of the nodes that were to be reached does not count.
        """
        loud = {index for index, _ in self.loud}
        leading = set(reached)  # to a node to be reached
        for index in self._graph.children_first():
            if any(entry and entry[0] in leading for entry in self._graph.edges[index]):
                leading.add(index)
        used = {entry for user in loud for entry in self._graph.edges[user] if entry}
        watched = leading.intersection(self.nodes)
        return sorted(at for at in used if at[0] in watched and at not in self.loud)


def make_code(environments: int, graph: Graph) -> Code | None:
    """Return the powers of the environments, as the dtypes of a graph allow; None: there is one."""
    if environments == 1:
        return None
    half = any(node._input_metadata[0].dtype == torch.float16 for node in graph.nodes)
    return Code(environments, 7 if half else 15)


def _noise(anchor: Anchor, generator: torch.Generator) -> Tensor:
    metadata = anchor.node._input_metadata[anchor.output]
    kind = torch.complex64 if metadata.dtype.is_complex else torch.float32
    shape = shape_of(anchor.node, anchor.output)
    values = torch.randn(shape, generator=generator, dtype=kind)
    return values.to(device=metadata.device, dtype=metadata.dtype)


def _along(tensor: Tensor, dim: int, factors: Tensor) -> Tensor:
    shape = [1] * tensor.dim()
    shape[dim] = len(factors)
    return tensor * factors.to(tensor.device, tensor.dtype.to_real()).view(shape)
