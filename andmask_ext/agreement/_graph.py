"""The autograd graph of a backward pass, and what of it depends on parameters only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

ACCUMULATE = "torch::autograd::AccumulateGrad"

# What these nodes make of parameters carries no batch: nothing but their inputs enters them.
CASTS = ("ToCopyBackward0",)
SAME_ORDER = (
    "AliasBackward0",
    "CloneBackward0",
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
)
TRANSPOSES = ("TBackward0",)
_OTHER_VIEWS = (
    "PermuteBackward0",
    "SelectBackward0",
    "SliceBackward0",
    "SplitBackward0",
    "SplitWithSizesBackward0",
    "TransposeBackward0",
    "TransposeBackward1",
    "UnbindBackward0",
    "UnsafeSplitBackward0",
)
VIEWS = frozenset((*CASTS, *SAME_ORDER, *TRANSPOSES, *_OTHER_VIEWS))

# Nodes that read data which autograd does not see as an input (indices), or that make new rows.
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
        chain: the indices of the nodes from there down to one parameter, the parameter's own
            included; empty where there are several parameters, or a node with several inputs.
        params: the parameters (their numbers among those tracked).
    """

    edge: int
    root: int
    output: int
    chain: tuple[int, ...]
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
        nexts: list[tuple[tuple[Node | None, int], ...]] = []
        index: dict[Node, int] = {}
        stack = list(roots)[::-1]
        while stack:
            node = stack.pop()
            if node in index:
                continue
            index[node] = len(self.nodes)
            self.nodes.append(node)
            following = node.next_functions
            nexts.append(following)
            for successor, _ in reversed(following):
                if successor is not None and successor not in index:
                    stack.append(successor)
        self.edges = [
            tuple(None if node is None else (index[node], output) for node, output in following)
            for following in nexts
        ]
        self.names: list[str | tuple[str, int | None]] = []
        for node in self.nodes:
            name = node.name()
            if name == ACCUMULATE:
                self.names.append((name, tracked.get(id(leaf(node)))))
            else:
                self.names.append(name)

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
        chain: list[int] = []
        at: int | None = root
        while at is not None:
            chain.append(at)
            if self.param(at) is not None:
                return Operand(edge, root, output, tuple(chain), (self.param(at) or 0,))
            following = self.edges[at]
            at = following[0][0] if len(following) == 1 and following[0] else None
        params = sorted({p for i in self.below(root) if (p := self.param(i)) is not None})
        return Operand(edge, root, output, (), tuple(params))

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


def leaf(node: Node) -> Tensor:
    """Return the tensor that an AccumulateGrad node is of."""
    variable: Tensor = node.variable  # type: ignore[attr-defined]
    return variable


def shape_of(node: Node, output: int = 0) -> tuple[int, ...]:
    """Return the shape of one output of a node in the forward pass."""
    return tuple(int(size) for size in node._input_metadata[output].shape)
