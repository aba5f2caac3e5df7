"""Nodes that move rows of data: the partitions of the rows follow from indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ._flows import GIVEN, UNKNOWN, At, Flow, Flows
from ._graph import Graph
from ._layout import Layout, candidates, fits, split_of
from ._nodes import saved
from ._picks import PICKING, Join, Move, Pick, Rows, Same, broadcast, route, signed, summed
from ._reading import Reader

_SEVERAL = ("SplitBackward0", "SplitWithSizesBackward0")


class Moves:
    """Explains nodes that move rows. All nodes below a node must have been read before.

    Args:
        graph: the graph of a backward pass.
        reader: tells batch axes.
        flows: where rows come from.

    Attributes:
        found: the moves that indices explain.
        unexplained: the other nodes that pick rows of data.
    """

    def __init__(self, graph: Graph, reader: Reader, flows: Flows) -> None:
        self.found: list[Move] = []
        self.unexplained: list[int] = []
        self._graph = graph
        self._reader = reader
        self._flows = flows

    def sums(self, index: int, weight: Sequence[bool]) -> bool:
        """Return whether a node may join rows of several environments, as values tell.

        It sums over them, or its gradient is summed over rows that share a row of an input.

        Args:
            index: the node.
            weight: for each node, whether it is made of parameters only.
        """
        edges = self._graph.edges[index]
        summed_over = [(edges[edge], axis) for edge, axis in summed(self._graph, index)]
        shared = [((index, 0), axis) for axis in broadcast(self._graph, index, weight)]
        return any(
            at is not None and self._has_several(at, axis) for at, axis in summed_over + shared
        )

    def _has_several(self, at: At, axis: int) -> bool:
        """Return whether rows along an axis belong to several environments, or may at other steps.

        A gradient that is zero everywhere says nothing: the plan holds until there is one.
        """
        evidence, code, dims = (
            self._reader.evidence(at),
            self._reader.code,
            len(self._reader.shape(at)),
        )
        if evidence is None or code is None or not evidence.seen or axis >= dims:
            return False
        axis %= max(1, dims)
        ids = evidence.ids(axis, code)
        if ids is None:
            return False
        if len(ids[ids >= 0].unique()) > 1:
            return True
        layouts = self._reader.layouts(at)
        return bool(layouts) and layouts[0].axis == axis

    def settle(self, at: At, layout: Layout) -> bool:
        """Return whether rows have this layout by whatever way they come, as later steps check."""
        reader, flow, own = self._reader, self._flows.of(at), self._reader.flow_of(layout.partition)
        if flow == own:
            return True
        if not own < flow or flow >= UNKNOWN:
            return False
        rows = layout.spread(reader.partitions[layout.partition].ids), layout.axis
        for number in sorted(flow - own):
            numbers = range(reader.given) if number in GIVEN else (number,)
            other = self._target(reader.shape(at), rows, numbers)
            if other is None:
                return False
            self.found.append(Same(layout, other))
        return True

    def crosses(self, at: At, layout: Layout) -> bool:
        """Return whether rows of data have another order than the gradients that they meet.

        No gradient may show it, as below a gate that is zero at first.
        """
        flow, partitions = self._flows.of(at), self._reader.partitions
        if flow == GIVEN or flow >= UNKNOWN or len(flow) > 1:
            return False
        [number] = flow
        rows = layout.spread(partitions[layout.partition].ids)
        return len(partitions[number].ids) == len(rows) and not torch.equal(
            partitions[number].ids, rows
        )

    # ---- rows one after the other ----

    def join(self, index: int, weight: Sequence[bool]) -> None:
        """Explain a node that joins tensors, if rows of some of them were moved.

        Args:
            index: the node.
            weight: for each node, whether it is made of parameters only.
        """
        at, edges, reader = (index, 0), self._graph.edges[index], self._reader
        if self._flows.of(at) == GIVEN:
            return
        data = [one for one in edges if one is not None and not weight[one[0]]]
        node, shape = self._graph.nodes[index], reader.shape(at)
        dim = signed(saved(node, "dim")) % max(1, len(shape))
        stacked = self._graph.names[index] == "StackBackward0"
        layouts = [] if stacked else self._along(data, dim)
        if not layouts and all(reader.layouts(one) for one in data):  # the rows stay
            self._flows.move(at, Flow().union(*(self._flows.of(one) for one in data)))
        if len(layouts) < len(edges):
            return
        if not all(self.settle(one, part) for one, part in zip(data, layouts, strict=True)):
            return
        spread = [one.spread(reader.partitions[one.partition].ids) for one in layouts]
        rows, evidence = (torch.cat(spread), dim), reader.evidence(at)
        known = None if evidence is None or not reader.code else evidence.ids(dim, reader.code)
        if known is not None and fits(rows[0], known):
            target = self._target(shape, rows, range(reader.given)) or self._new(rows)
            self.found.append(Join(index, tuple(layouts), target))
            self._flows.move(at, reader.flow_of(target.partition))

    def fill(self, index: int) -> None:
        """Explain a tensor that is filled part by part with the first rows of each part's order.

        So does the way back from a packed sequence, whose parts are the steps.
        """
        at = (index, 0)
        flow = self._flows.of(at)
        if len(flow) == 1 or flow >= UNKNOWN:
            return
        numbers = sorted(flow)
        self._flows.move(at, UNKNOWN)
        for whole in numbers:
            steps = [self._steps(whole, part) for part in numbers]
            if all(steps):
                most = Layout(0, 1, 1, whole)
                for part, count in zip(numbers, steps, strict=True):
                    self.found.append(Same(most, Layout(0, 1, 1, part), count))
                self._flows.move(at, self._reader.flow_of(whole))
                return

    def _steps(self, whole: int, part: int) -> int:
        """Return how often rows repeat the first ones of other rows; 0: they do not."""
        ids, rows = (self._reader.partitions[number].ids for number in (whole, part))
        for count in range(1, len(rows) + 1):
            first = len(rows) // count
            if first * count == len(rows) and torch.equal(ids[:first].repeat(count), rows):
                return count
        return 0

    def _along(self, tensors: Sequence[At], dim: int) -> list[Layout]:
        """Return the layouts of tensors whose batch axis is ``dim``."""
        found = []
        for at in tensors:
            layouts, shape = self._reader.layouts(at, (dim,)), self._reader.shape(at)
            if len({split_of(shape, layout) for layout in layouts}) == 1:
                found.append(layouts[0])
        return found

    # ---- rows that are picked by an index ----

    def pick(self, index: int, shown: bool) -> None:
        """Explain a node that picks rows of data.

        Args:
            index: the node.
            shown: it picks rows of data that require no gradients, such as a table that all
                examples share.
        """
        name = str(self._graph.names[index])
        outputs = range(len(self._graph.nodes[index]._input_metadata))
        several = name in _SEVERAL
        found = [self._explain(index, out, PICKING[name]) for out in (outputs if several else (0,))]
        if all(flow is not None for flow in found):
            self._flows.prove(index)
        if UNKNOWN in found or (None in found and not shown):
            self.unexplained.append(index)
        for output in outputs:
            flow = found[output] if several else found[0]
            self._flows.move((index, output), flow or (GIVEN if shown else UNKNOWN))

    def _explain(self, index: int, output: int, small_input: int | None) -> Flow | None:
        """Return where the rows of an output come from, or None if environments may mix here.

        UNKNOWN: they are apart, but the index may be read in several ways.
        """
        reader, edges = self._reader, self._graph.edges[index]
        large: At | None = (index, 0)
        small: At | None = (index, output)
        if small_input is None:
            large = edges[0]
        else:
            small = edges[small_input]
        if large is None or small is None or reader.code is None:
            return None
        evidence = reader.evidence(small)
        is_input = isinstance(self._graph.names[large[0]], tuple)  # no probe ends there
        if evidence is None or (reader.evidence(large) is None and not is_input):
            return None
        if self._is_of_one(large):
            return self._flows.of(large)
        explained: dict[tuple[int, int, int], tuple[Layout, Rows, bool]] = {}
        for layout in reader.layouts(large):
            ids = layout.spread(reader.partitions[layout.partition].ids)
            rows = route(self._graph, index, output, ids, layout.axis)
            if rows is None:
                continue
            found = evidence.ids(rows[1], reader.code)
            if found is not None and fits(rows[0], found):
                explained[split_of(reader.shape(large), layout)] = layout, rows, rows[0] is ids
        if len(explained) != 1:
            return UNKNOWN if explained else None
        [(layout, rows, stay)] = explained.values()
        if not self.settle(large, layout):
            return UNKNOWN
        source = reader.flow_of(layout.partition)
        if stay:  # for any index
            return source
        moved = [number for number in sorted(self._flows.of(small)) if number >= reader.given]
        shape = reader.shape(small)
        if 0 in shape and moved:  # as of an expert without rows
            target: Layout | None = Layout(rows[1], 1, 1, moved[0])
        else:  # Rows that are in place must be so at each step, or environments mix.
            target = self._target(shape, rows, (*range(reader.given), *moved))
        if target is None and small_input is None:
            target = self._new(rows)
        if target is None or (small_input is not None and not self.settle(small, target)):
            return UNKNOWN
        self.found.append(Pick(index, output, layout, target))
        return source if small_input is not None else reader.flow_of(target.partition)

    def _is_of_one(self, at: At) -> bool:
        """Return whether a tensor has no batch axis, and is of one environment as a whole."""
        evidence, code = self._reader.evidence(at), self._reader.code
        if evidence is None or code is None or not evidence.seen or self._reader.layouts(at):
            return False
        found = [evidence.ids(axis, code) for axis in range(len(evidence.shape))]
        return all(ids is not None and len(ids[ids >= 0].unique()) == 1 for ids in found)

    def _target(self, shape: Sequence[int], rows: Rows, numbers: Iterable[int]) -> Layout | None:
        """Return the layout by which rows belong to one of some partitions."""
        ids, axis = rows
        for number in numbers:
            groups = self._reader.partitions[number]
            for layout in candidates(shape, groups.examples, (axis,), number):
                if torch.equal(layout.spread(groups.ids), ids):
                    return layout
        return None

    def _new(self, rows: Rows) -> Layout:
        return Layout(rows[1], 1, 1, self._reader.add_rows(rows[0]))
