"""Reading of the mixing check: the batch axis of each output of a node."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ._graph import RESHAPES, Graph
from ._groups import Groups, group_rows
from ._layout import Code, Evidence, Layout, candidates, fits, split_of
from ._nodes import shape_of
from ._picks import PICKING, Pick, Rows, Single, route

# By the index of a node: the evidence on each of its outputs.
Evidences = Mapping[int, list[Evidence]]

At = tuple[int, int]  # the index of a node, and the number of its output


class Reader:
    """Finds batch axes. Rows that nodes pick by an index get partitions of their own.

    Args:
        graph: the graph of a backward pass.
        batches: the partitions of the batch.
        evidences: the results of the mixing check.
        code: the powers of the environments; None: there is only one.

    Attributes:
        picks: the nodes that move rows, and whose indices explain the environments of the rows;
            and the rows of single environments.
        unexplained: the other nodes that pick rows of data.
        partitions: the partitions of the batch, and those of picked rows.
    """

    def __init__(
        self, graph: Graph, batches: Sequence[Groups], evidences: Evidences, code: Code | None
    ) -> None:
        self.picks: list[Pick | Single] = []
        self.unexplained: list[int] = []
        self.partitions = list(batches)
        self._graph = graph
        self._static = len(batches)
        self._evidences = evidences
        self._code = code
        self._origins: dict[int, int] = {}  # number of a partition -> node that picked its rows
        self._singles: dict[Single, int] = {}
        self._users: dict[int, list[int]] = {}
        for user, edges in enumerate(graph.edges):
            for entry in edges:
                if entry is not None:
                    self._users.setdefault(entry[0], []).append(user)

    def shape(self, at: At) -> tuple[int, ...]:
        """Return the shape of an output."""
        return shape_of(self._graph.nodes[at[0]], at[1])

    def evidence(self, at: At) -> Evidence | None:
        """Return the evidence on an output; None: no probe could reach the node."""
        found = self._evidences.get(at[0])
        return None if found is None else found[at[1]]

    def seen(self, index: int) -> bool:
        """Return whether a gradient reached a node in a probe."""
        return any(output.seen for output in self._evidences.get(index, ()))

    def possible(self, at: At, axes: Sequence[int] | None) -> list[Layout]:
        """Return the layouts that the shape of an output allows, the most usual first."""
        shape = self.shape(at)
        for number in range(self._static):
            found = candidates(shape, self.partitions[number].examples, axes, number)
            if found:
                return found
        return []

    def layouts(self, at: At, axes: Sequence[int] | None = None) -> list[Layout]:
        """Return the layouts that agree with all probes."""
        evidence, shape = self.evidence(at), self.shape(at)
        if evidence is None or self._code is None or not evidence.seen:
            return self.possible(at, axes)
        for number in range(self._static):
            groups = self.partitions[number]
            left = [
                layout
                for layout in candidates(shape, groups.examples, axes, number)
                if (ids := evidence.ids(layout.axis, self._code)) is not None
                and fits(layout.spread(groups.ids), ids)
            ]
            if left:
                return self._plain(at, left, groups.examples)
        picked = self._picked(at, axes)
        if picked is not None:
            return [picked]
        # Where the batch would fit, another environment in its rows means that they mix.
        environment = None if self.possible(at, None) else self._single(at)
        if environment is not None and shape:
            return [Layout(0, 1, 1, self._partition_of(Single(shape[0], environment)))]
        return []

    def _plain(self, at: At, left: list[Layout], examples: int) -> list[Layout]:
        """Keep the layouts that shapes make plain, as rows without a gradient allow too many.

        If the first axis has the size of the batch, in the tensor or in the next one, whose rows
        are split, the batch is an axis of that size.
        """
        evidence, shape = self.evidence(at), self.shape(at)
        assert evidence is not None
        assert self._code is not None
        kept = []
        for layout in left:
            ids = evidence.ids(layout.axis, self._code)
            if ids is None or bool((ids >= 0).all()):
                kept.append(layout)
                continue
            exact = self._exact(shape, examples, layout)
            plain = {split_of(shape, one) for one in exact if one.axis <= layout.axis}
            for user in self._users.get(at[0], ()):
                after = self.shape((user, 0))
                if self._graph.names[user] in RESHAPES and len(after) > len(shape):
                    found = self._exact(after, examples, layout)
                    lead = math.prod(shape[: layout.axis + 1])
                    inside = [one for one in found if math.prod(after[: one.axis + 1]) <= lead]
                    plain |= {split_of(after, one) for one in inside}
            if not plain or split_of(shape, layout) in plain:
                kept.append(layout)
        return kept

    @staticmethod
    def _exact(shape: Sequence[int], examples: int, like: Layout) -> list[Layout]:
        if not shape or shape[0] != examples:
            return []
        sizes = enumerate(shape)
        return [Layout(axis, 1, 1, like.partition) for axis, size in sizes if size == examples]

    def _single(self, at: At) -> int | None:
        """Return the environment that all gradients of an output belong to, if there is one."""
        evidence = self.evidence(at)
        if evidence is None or self._code is None:
            return None
        for axis in range(len(evidence.shape)):
            ids = evidence.ids(axis, self._code)
            known = None if ids is None else ids[ids >= 0]
            if known is not None and len(known) and bool((known == known[0]).all()):
                return int(known[0])
        return None

    def _partition_of(self, single: Single) -> int:
        if single not in self._singles:
            self.picks.append(single)
            self.partitions.append(single.groups(self.partitions[0].environments))
            self._singles[single] = len(self.partitions) - 1
        return self._singles[single]

    def choose(self, at: At, axes: Sequence[int] | None) -> tuple[Layout | None, bool]:
        """Return the layout of an output (None: there is none), and whether it is the only one."""
        left = self.layouts(at, axes)
        if not left:
            return None, False
        shape = self.shape(at)
        # If the probes leave several layouts, all of them treat the gradients of this graph alike.
        # For another graph of the same structure they may differ.
        if len({split_of(shape, layout) for layout in left}) > 1:
            left = self._as_reshaped(at, left)
        alone = len({split_of(shape, layout) for layout in left}) == 1
        # Which example a row is may change from step to step.
        alone = alone and self._single(at) is None
        sure = self._code is None or self.evidence(at) is not None
        return (left[0] if alone or sure else None), alone or self._code is None

    def _as_reshaped(self, at: At, left: list[Layout]) -> list[Layout]:
        """Keep the layouts that agree with the tensor's next shape, where axes are apart."""
        shape = self.shape(at)
        for user in self._users.get(at[0], ()):
            if self._graph.names[user] in RESHAPES and self.evidence((user, 0)) is not None:
                shape_after = self.shape((user, 0))
                splits = {split_of(shape_after, one) for one in self.layouts((user, 0))}
                same = [layout for layout in left if split_of(shape, layout) in splits]
                if same and len(splits) == 1:
                    return same
        return left

    def _picked(self, at: At, axes: Sequence[int] | None) -> Layout | None:
        """Return the layout by the nearest node below that picked rows of these environments."""
        evidence, shape = self.evidence(at), self.shape(at)
        assert evidence is not None
        assert self._code is not None
        matching: dict[int, Layout] = {}
        for number, node in self._origins.items():
            groups = self.partitions[number]
            for layout in candidates(shape, groups.examples, axes, number):
                ids = evidence.ids(layout.axis, self._code)
                if ids is not None and fits(layout.spread(groups.ids), ids):
                    matching.setdefault(node, layout)
        if not matching:
            return None
        seen, waiting = {at[0]}, [at[0]]
        for index in waiting:
            if index in matching:
                return matching[index]
            for entry in self._graph.edges[index]:
                if entry is not None and entry[0] not in seen:
                    seen.add(entry[0])
                    waiting.append(entry[0])
        return None

    def is_apart(self, at: At, axes: Sequence[int] | None) -> bool:
        """Return whether each row of an output belongs to one environment, whatever its order."""
        evidence, code = self.evidence(at), self._code
        if evidence is None or code is None:
            return False
        found = range(len(evidence.shape)) if axes is None else axes
        return any(a < len(evidence.shape) and evidence.ids(a, code) is not None for a in found)

    # ---- nodes that pick rows ----

    def pick(self, index: int) -> None:
        """Explain a node that picks rows of data. All nodes below it must have been explained."""
        name = str(self._graph.names[index])
        outputs = range(len(self._graph.nodes[index]._input_metadata))
        several = name in ("SplitBackward0", "SplitWithSizesBackward0")
        explained = [
            self._explains(index, output, PICKING[name])
            for output in (outputs if several else (0,))
        ]
        if not all(explained):
            self.unexplained.append(index)

    def _explains(self, index: int, output: int, small_input: int | None) -> bool:
        edges = self._graph.edges[index]
        large: At | None = (index, 0)
        small: At | None = (index, output)
        if small_input is None:
            large = edges[0]
        else:
            small = edges[small_input]
        if large is None or small is None or self._code is None:
            return False
        evidence = self.evidence(small)
        is_input = isinstance(self._graph.names[large[0]], tuple)  # no probe ends there
        if evidence is None or not evidence.seen:
            return False
        if self.evidence(large) is None and not is_input:
            return False
        for layout in self.layouts(large):
            ids = layout.spread(self.partitions[layout.partition].ids)
            rows = route(self._graph, index, output, ids, layout.axis)
            if rows is None:
                continue
            found = evidence.ids(rows[1], self._code)
            if found is None or not fits(rows[0], found):
                continue
            if rows[0] is ids:  # all rows stay where they are, for any index
                return True
            target = self._small(index, small, rows, small_input is None)
            if target is not None:
                self.picks.append(Pick(index, output, layout, target))
                return True
        return False

    def _small(self, index: int, small: At, rows: Rows, picked: bool) -> Layout | None:
        """Return the layout of the small tensor. Only rows that are picked may have a new order."""
        ids, axis = rows
        for layout in self.layouts(small, (axis,)):
            if torch.equal(layout.spread(self.partitions[layout.partition].ids), ids):
                return layout
        if not picked or self._code is None:
            return None
        self.partitions.append(group_rows(ids, self._code.environments))
        self._origins[len(self.partitions) - 1] = index
        return Layout(axis, 1, 1, len(self.partitions) - 1)
