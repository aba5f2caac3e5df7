"""Where the rows of each tensor come from, and whether environments are proved to be apart there.

Environments are apart if at each source, where data enter the graph, every row belongs to the
environment of its own example. Then the loss of an environment reaches no row of another one,
whatever lies between: the rows may have any order there, and the probes tell whose they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ._data import DataRecord
from ._graph import CHECKPOINT, Graph
from ._picks import JOINS, PICKING
from ._refusals import REENTRANT_INPUT

At = tuple[int, int]  # the index of a node, and the number of its output

# The partitions that the rows of a tensor may belong to, by their numbers. Each partition of the
# batch counts as GIVEN. UNKNOWN: nodes below have moved the rows in a way that nothing tells.
Flow = frozenset[int]
GIVEN, UNKNOWN = Flow((0,)), Flow((-1,))


@dataclass(frozen=True)
class Entrance:
    """How data come into a graph.

    Attributes:
        proved: whether environments are proved to be apart in the inputs that require gradients.
        moved: whether nodes outside of the graph may have moved the rows of these.
        moves_inside: whether regions of the graph that hide their nodes (reentrant checkpointing)
            may move rows.
    """

    proved: bool = False
    moved: bool = False
    moves_inside: bool = False

    def of_regions(self, apart: bool, moves: bool) -> Entrance:
        """Return how data come into the regions of a graph that hide their nodes.

        Args:
            apart: whether environments are proved to be apart there.
            moves: whether nodes of the graph move rows.
        """
        return Entrance(apart, self.moved or moves)


class Flows:
    """Follows rows through a graph. Nodes must enter inputs first.

    Args:
        graph: the graph of a backward pass.
        entrance: how data come into it.
    """

    def __init__(self, graph: Graph, entrance: Entrance) -> None:
        self._graph = graph
        self._entrance = entrance
        self._flows: dict[At, Flow] = {}
        self._proved = [False] * len(graph.nodes)
        self._inputs: dict[int, list[At]] = {}
        self._free = [False] * len(graph.nodes)  # made of parameters that are not tracked
        self._shown = [False] * len(graph.nodes)  # gradients only go to what ShownData made

    def enter(self, index: int, weight: Sequence[bool], data: DataRecord) -> None:
        """Follow rows into a node.

        Args:
            index: the node.
            weight: for each node, whether it is made of parameters only.
            data: what leaves are made of.

        Raises:
            RuntimeError: a region would have no gradients without that leaf.
        """
        graph = self._graph
        below = [one[0] for one in graph.edges[index] if one is not None]
        node = graph.nodes[index]
        self._shown[index] = node in data.shown or (
            bool(below) and all(self._shown[one] for one in below)
        )
        if graph.names[index] == CHECKPOINT and self._shown[index]:
            raise RuntimeError(REENTRANT_INPUT)
        if graph.is_untracked_leaf(index):
            self._flows[index, 0] = UNKNOWN if self._entrance.moved else GIVEN
            self._proved[index] = self._entrance.proved
            self._free[index] = data.is_free(node)
            return
        apart = [self._free[one] or weight[one] for one in below]
        self._free[index] = bool(below) and all(apart) and not graph.may_carry_batch(index)
        entries = [
            one
            for one in graph.edges[index]
            if one is not None and not weight[one[0]] and not self._free[one[0]]
        ]
        self._inputs[index] = entries
        self._proved[index] = bool(entries) and all(self._proved[entry[0]] for entry in entries)
        name = graph.names[index]
        small = PICKING.get(str(name))  # its rows go to places of the other input
        rows = [one for one in entries if small is None or one != graph.edges[index][small]]
        flow = Flow().union(*(self.of(entry) for entry in rows)) or GIVEN
        hides = name == CHECKPOINT and self._entrance.moves_inside
        hides = hides or (bool(entries) and graph.hides_moves(index, entries))
        if hides or (flow != GIVEN and (name in JOINS or graph.holds_indices(index))):
            flow = UNKNOWN
        for output in range(len(node._input_metadata)):
            self._flows[index, output] = flow

    def of(self, at: At) -> Flow:
        """Return where the rows of an output come from."""
        return self._flows.get(at, UNKNOWN)

    def move(self, at: At, flow: Flow) -> None:
        """Say that a node has moved rows."""
        self._flows[at] = flow

    def is_source(self, index: int) -> bool:
        """Return whether data enter a node by no input that requires gradients."""
        return self._inputs.get(index) == []

    def inputs(self, index: int) -> list[At]:
        """Return the outputs of nodes by which data enter a node."""
        return self._inputs.get(index, [])

    def is_proved(self, index: int) -> bool:
        """Return whether environments are apart in a node, by itself or by the nodes below it."""
        return self._proved[index]

    def prove(self, index: int) -> None:
        """Say that each row of a node belongs to the environment of its own example."""
        self._proved[index] = True

    def regions_are_proved(self) -> bool:
        """Return whether environments are apart in what enters regions that hide their nodes."""
        names = enumerate(self._graph.names)
        return all(self._proved[index] for index, name in names if name == CHECKPOINT)
