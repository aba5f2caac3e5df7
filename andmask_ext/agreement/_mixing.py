"""The mixing check: whether environments mix, and where the batch is in each tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from ._formulas import axes_of
from ._graph import Graph
from ._groups import Groups
from ._layout import Evidence
from ._nodes import leaf, shape_of
from ._plan import Evidences, suspects

Engine = Callable[[Graph, list[Tensor], list[Tensor], bool, list[Any]], None]


class MixingCheck:
    """Runs probes: backward passes from the model's outputs that fill :class:`Evidence`.

    Args:
        engine: runs a backward pass over a graph. It takes the graph, its roots, their gradients,
            whether to retain the graph, and the nodes and leaves to reach.
    """

    def __init__(self, engine: Engine) -> None:
        self.running = False
        self._engine = engine
        self._groups: Groups | None = None
        self._factors: Tensor | None = None  # the factor of each example in this pass
        self._inner = 0  # number of backward passes inside this one
        self._by_pass: dict[int, dict[int, list[Evidence]]] = {}
        self._evidence: dict[int, list[Evidence]] = {}

    def evidence(self, inner: int) -> Evidences:
        """Return the evidence on the nodes of a graph, by the index of the node.

        Args:
            inner: 0 for the graph given to :meth:`find`, else the number of the backward pass
                inside it.
        """
        return self._by_pass.get(inner, {}) if inner else self._evidence

    def find(
        self, graph: Graph, probe: Graph, anchors: list[Tensor], batch_dim: int, groups: Groups
    ) -> None:
        """Run the probes.

        Args:
            graph: the graph of the backward pass that follows.
            probe: the part of the graph below the anchors.
            anchors: the outputs of the model.
            batch_dim: the batch dimension of the anchors.
            groups: the environments.
        """
        self._by_pass, self._evidence = {}, {}
        if groups.environments == 1 or not anchors:
            return
        self._groups = groups
        dtypes = {node._input_metadata[0].dtype for node in probe.nodes}
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randn(anchor.shape, generator=generator).to(anchor) for anchor in anchors]
        digits = _digits(groups.environments, 8 if torch.float16 in dtypes else 16)
        self.running = True
        try:
            for powers in (None, *digits):
                self._inner, self._factors = 0, None
                grads = noise
                if powers is not None:
                    self._factors = torch.pow(2.0, powers).double()[groups.ids]
                    grads = [_along(values, batch_dim, self._factors) for values in noise]
                self._pass(probe, anchors, grads, self._by_pass.setdefault(0, {}), [])
        finally:
            self.running = False
        index_of = {node: index for index, node in enumerate(graph.nodes)}
        self._evidence = {
            index_of[probe.nodes[index]]: seen
            for index, seen in self._by_pass[0].items()
            if probe.nodes[index] in index_of
        }

    def inner_pass(self, graph: Graph, roots: list[Tensor], grads: list[Tensor]) -> None:
        """Run a backward pass inside a probe (reentrant checkpointing)."""
        self._inner += 1
        leaves = [leaf(n) for i, n in enumerate(graph.nodes) if graph.is_untracked_leaf(i)]
        self._pass(graph, roots, grads, self._by_pass.setdefault(self._inner, {}), leaves)

    def _pass(
        self,
        graph: Graph,
        roots: list[Tensor],
        grads: list[Tensor],
        evidences: dict[int, list[Evidence]],
        leaves: list[Tensor],
    ) -> None:
        groups, factors = self._groups, self._factors
        assert groups is not None
        handles, inputs = [], list[Any](leaves)

        def make_hook(index: int) -> Callable[[tuple[Tensor | None, ...]], None]:
            def hook(deltas: tuple[Tensor | None, ...]) -> None:
                for evidence, delta in zip(evidences[index], deltas, strict=True):
                    if delta is not None:
                        evidence.add(delta, factors)

            return hook

        for index in suspects(graph):
            node = graph.nodes[index]
            if index not in evidences:
                evidences[index] = _no_evidence(node, str(graph.names[index]), groups.examples)
            handles.append(node.register_prehook(make_hook(index)))
            inputs.append(GradientEdge(node, 0))
        try:
            if inputs:
                self._engine(graph, roots, grads, True, inputs)
        finally:
            for handle in handles:
                handle.remove()


def _digits(environments: int, base: int) -> list[Tensor]:
    """Return the digits of each environment's number. Any two environments differ in a digit."""
    numbers = torch.arange(environments)
    if environments <= base:
        return [numbers * ((base - 1) // (environments - 1))]
    digits = []
    while bool((numbers > 0).any()):
        digits.append(numbers % base)
        numbers = numbers // base
    return digits


def _no_evidence(node: Node, name: str, examples: int) -> list[Evidence]:
    return [
        Evidence(shape_of(node, output), examples, axes_of(name))
        for output in range(len(node._input_metadata))
    ]


def _along(tensor: Tensor, dim: int, factors: Tensor) -> Tensor:
    shape = [1] * tensor.dim()
    shape[dim] = len(factors)
    return tensor * factors.to(tensor).view(shape)
