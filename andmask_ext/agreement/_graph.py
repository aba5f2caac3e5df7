"""The autograd graph of a backward pass, and what of it depends on parameters only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.autograd.graph import Node

from ._chain import VIEWS, View, view_through
from ._nodes import leaf, shape_of

ACCUMULATE = "torch::autograd::AccumulateGrad"

# Nodes that read data which autograd does not see as an input (indices), or make new rows.
LOOKUPS = {  # and the name of the indices
    "EmbeddingBackward0": "indices",
    "EmbeddingBagBackward0": "indices",
    "GatherBackward0": "index",
    "IndexBackward0": "indices",
    "IndexSelectBackward0": "index",
    "TakeBackward0": "index",
}
_HIDDEN_DATA = (*LOOKUPS, "ExpandBackward0", "RepeatBackward0")


@dataclass(frozen=True)
class Operand:
    """An input of a node that is made of parameters only.

    Attributes:
        edge: which of the node's inputs.
        root: the index of the node that made it.
        output: which of that node's outputs.
        shape: of the input.
        view: if it is a view of one parameter, where its elements lie in that.
        params: the parameters (their numbers among those tracked).
    """

    edge: int
    root: int
    output: int
    shape: tuple[int, ...]
    view: View | None
    params: tuple[int, ...]


class Graph:
    """All nodes between some roots and the leaves, in an order that depends on structure only.

    Attributes:
        nodes: the nodes.
        edges: for each node, one entry per input: None, or (index of a node, its output).
        names: for each node, its type; for a leaf that is tracked, with the parameter's number.
    """

    def __init__(self, roots: Iterable[Node], tracked: Mapping[int, int]) -> None:
        self.nodes: list[Node] = []
        nexts = []
        index: dict[Node, int] = {}
        stack = list(roots)[::-1]
        while stack:
            node = stack.pop()
            if node in index:
                continue
            index[node] = len(index)
            self.nodes.append(node)
            following = node.next_functions
            nexts.append(following)
            for successor, _ in following[::-1]:
                if successor is not None and successor not in index:
                    stack.append(successor)
        self.edges: list[tuple[tuple[int, int] | None, ...]] = [
            tuple([None if node is None else (index[node], output) for node, output in following])
            for following in nexts
        ]
        self.names: list[str | tuple[str, int | None]] = [
            node.name() if node.next_functions else _leaf_name(node, tracked)
            for node in self.nodes
        ]

    @cached_property
    def signature(self) -> Any:
        """What two graphs of the same structure on the same parameters have in common."""
        return tuple(zip(self.names, self.edges, strict=True))

    def param(self, index: int) -> int | None:
        """Return the number of the tracked parameter that a node is the leaf of."""
        name = self.names[index]
        return name[1] if isinstance(name, tuple) else None

    def is_untracked_leaf(self, index: int) -> bool:
        """Return whether a node is the leaf of a tensor that is not tracked."""
        name = self.names[index]
        return isinstance(name, tuple) and name[1] is None

    def children_first(self) -> list[int]:
        """Return the indices of all nodes, inputs before those that use them."""
        order: list[int] = []
        state = [0] * len(self.nodes)
        for start in range(len(self.nodes)):
            stack = [start]
            while stack:
                index = stack[-1]
                if state[index] == 0:
                    state[index] = 1
                    stack.extend(e[0] for e in self.edges[index] if e and state[e[0]] == 0)
                else:
                    stack.pop()
                    if state[index] == 1:
                        state[index] = 2
                        order.append(index)
        return order

    def may_carry_batch(self, index: int) -> bool:
        """Return whether data may enter a node beside its inputs that require gradients."""
        name = self.names[index]
        if isinstance(name, tuple) or name in VIEWS:
            return False
        return name in _HIDDEN_DATA or None in self.edges[index]

    def operand(self, index: int, edge: int) -> Operand:
        """Describe the input of a node that is made of parameters only."""
        entry = self.edges[index][edge]
        assert entry is not None
        root, output = entry
        shape = shape_of(self.nodes[root], output)
        chain: list[tuple[Node, int]] = []
        at: tuple[int, int] | None = entry
        while at is not None:
            param = self.param(at[0])
            if param is not None:
                view = view_through(chain[::-1], leaf(self.nodes[at[0]]).shape)
                return Operand(edge, root, output, shape, view, (param,))
            chain.append((self.nodes[at[0]], at[1]))
            following = self.edges[at[0]]
            at = following[0] if len(following) == 1 else None
        params = sorted({p for i in self.below(root) if (p := self.param(i)) is not None})
        return Operand(edge, root, output, shape, None, tuple(params))

    def below(self, index: int) -> set[int]:
        """Return the indices of a node and of all that it depends on."""
        seen = {index}
        stack = [index]
        while stack:
            for entry in self.edges[stack.pop()]:
                if entry and entry[0] not in seen:
                    seen.add(entry[0])
                    stack.append(entry[0])
        return seen


def _leaf_name(node: Node, tracked: Mapping[int, int]) -> str | tuple[str, int | None]:
    name = node.name()
    return (name, tracked.get(id(leaf(node)))) if name == ACCUMULATE else name
