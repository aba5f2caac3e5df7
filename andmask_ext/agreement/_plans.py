"""The plans of earlier graphs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._graph import Graph
from ._groups import Groups
from ._plan import Plan

_MOST_STRUCTURES = 128
_MOST_PLANS = 2048


class Key(NamedTuple):
    """What graphs have in common that may have the same plan, but for sizes and indices."""

    structure: Any
    inner: int
    batches: tuple[tuple[int, int, bool], ...]


class Plans:
    """Keeps plans by the structure of the graph, and in each structure by sizes and indices.

    What was not used for longest is dropped first.
    """

    def __init__(self) -> None:
        self._structures: OrderedDict[Key, _Structure] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def key(self, graph: Graph, batches: Sequence[Groups], inner: int) -> Key:
        """Return the key of a graph.

        Args:
            graph: the graph of a backward pass.
            batches: the partitions of the batch.
            inner: 0 for the outer pass, else the number of the backward pass inside it.
        """
        signature = graph.structure(batches[0].examples)
        sizes = tuple((one.examples, one.environments, one.size is not None) for one in batches)
        return Key(signature, inner, sizes)

    def find(
        self, key: Key, sizes: Any, graph: Graph, batches: Sequence[Groups], adapt: bool
    ) -> tuple[Plan, list[Groups]] | None:
        """Return a plan that holds for a graph, and its partitions; None: there is none.

        Args:
            key: the key of the graph.
            sizes: the sizes of the inputs.
            graph: the graph.
            batches: the partitions of the batch.
            adapt: whether a plan for other sizes may be adapted.
        """
        structure = self._structures.get(key)
        if structure is None:
            return None
        self._structures.move_to_end(key)
        if not structure.holds_for(batches[0]):
            return None
        contents = structure.contents(graph)
        plan = structure.plans.get((sizes, contents))
        if plan is not None:
            structure.plans.move_to_end((sizes, contents))
            partitions = plan.partitions(graph, batches)
            if partitions is not None and plan.fits(graph, partitions):
                return plan, partitions
        plan = structure.plans.get((None, contents)) if adapt else None
        if plan is None:
            return None
        partitions = plan.partitions(graph, batches)
        plan = None if partitions is None else plan.at(graph, partitions)
        if plan is None or partitions is None:
            return None
        self._put(structure, (sizes, contents), plan)
        return plan, partitions

    def keep(
        self,
        key: Key,
        sizes: Any,
        graph: Graph,
        batches: Sequence[Groups],
        plan: Plan,
        by_contents: bool,
    ) -> None:
        """Keep a plan.

        Args:
            key: the key of the graph.
            sizes: the sizes of the inputs.
            graph: the graph.
            batches: the partitions of the batch.
            plan: its plan.
            by_contents: whether the plan holds only if the same rows are picked where the plan
                cannot tell.
        """
        structure = self._structures.setdefault(key, _Structure())
        if by_contents and not set(plan.contents) <= set(structure.indices):
            self._count -= len(structure.plans)
            structure.plans.clear()
            structure.indices = tuple(sorted({*structure.indices, *plan.contents}))
        structure.refine(batches[0])
        contents = structure.contents(graph)
        self._put(structure, (sizes, contents), plan)
        if sizes:
            self._put(structure, (None, contents), plan)
        while len(self._structures) > _MOST_STRUCTURES:
            _, oldest = self._structures.popitem(last=False)
            self._count -= len(oldest.plans)

    def drop(self, key: Key) -> None:
        """Drop all plans of a structure."""
        structure = self._structures.pop(key, None)
        if structure is not None:
            self._count -= len(structure.plans)

    def _put(self, structure: _Structure, key: Any, plan: Plan) -> None:
        self._count += key not in structure.plans
        structure.plans[key] = plan
        while self._count > _MOST_PLANS:
            oldest = next(one for one in self._structures.values() if one.plans)
            oldest.plans.popitem(last=False)
            self._count -= 1


class _Structure:
    """The plans of one structure.

    Attributes:
        plans: by the sizes of the inputs (None: any sizes) and the picked rows.
        indices: the nodes whose picked rows matter.
        parts: for each example, the part of the batch that other parts are known not to mix with.
            It is learned from batches with ids.
    """

    def __init__(self) -> None:
        self.plans: OrderedDict[Any, Plan] = OrderedDict()
        self.indices: tuple[int, ...] = ()
        self.parts: Tensor | None = None

    def holds_for(self, groups: Groups) -> bool:
        """Return whether it is known that these environments do not mix."""
        if groups.size is not None or self.parts is None:
            return groups.size is not None
        one = torch.zeros_like(groups.ids).scatter_(0, self.parts, groups.ids)
        return torch.equal(one[self.parts], groups.ids)

    def refine(self, groups: Groups) -> None:
        """Take it that these environments do not mix."""
        if groups.size is None:
            parts = groups.ids if self.parts is None else self.parts * len(groups.ids) + groups.ids
            self.parts = torch.unique(parts, return_inverse=True)[1]

    def contents(self, graph: Graph) -> Any:
        return tuple([graph.contents(index) for index in self.indices])
