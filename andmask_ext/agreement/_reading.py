"""Reading of the mixing check: the batch axis of each output of a node."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ._data import DataRecord
from ._flows import GIVEN, At, Flow, Flows
from ._graph import RESHAPES, Graph
from ._groups import Groups, group_rows
from ._inherited import inherited
from ._layout import Code, Evidence, Layout, candidates, fits, split_of
from ._nodes import saved, shape_of

# By the index of a node: the evidence on each of its outputs.
Evidences = Mapping[int, list[Evidence]]


# The saved tensor that has the rows of the output, of nodes that take data without gradients.
_ROWS = {
    "AddmmBackward0": "mat1", "EmbeddingBackward0": "indices", "MmBackward0": "self",
    "NativeLayerNormBackward0": "input",
}  # fmt: skip


class Reader:
    """Finds batch axes.

    Args:
        graph: the graph of a backward pass.
        batches: the partitions of the batch.
        evidences: the results of the mixing check.
        code: the powers of the environments; None: there is only one.
        flows: where rows come from. A node must have entered before it is read.
        data: the inputs of the model.
        batch_dim: their batch dimension.

    Attributes:
        given: the number of partitions of the batch.
        partitions: these, and those of rows that were moved.
        quiet: the rows without a gradient of outputs whose rows go by the probes alone.
        code: as above.
    """

    def __init__(
        self,
        graph: Graph,
        batches: Sequence[Groups],
        evidences: Evidences,
        code: Code | None,
        flows: Flows,
        data: DataRecord,
        batch_dim: int,
    ) -> None:
        self.partitions = list(batches)
        self.quiet: dict[At, Tensor] = {}
        self._below: dict[At, Layout | None] = {}
        self._graph = graph
        self.given = len(batches)
        self._evidences = evidences
        self.code = code
        self._flows = flows
        self._data = data
        self._batch_dim = batch_dim
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
        for number in range(self.given):
            found = candidates(shape, self.partitions[number].examples, axes, number)
            if found:
                return found
        return []

    def layouts(self, at: At, axes: Sequence[int] | None = None) -> list[Layout]:
        """Return the layouts that agree with all probes, and with the nodes that move rows."""
        evidence, shape = self.evidence(at), self.shape(at)
        if evidence is None or self.code is None:
            return self.possible(at, axes)
        moved = [number for number in sorted(self._flows.of(at)) if number >= self.given]
        if 0 in shape:  # as of an expert without rows
            return [Layout(shape.index(0), 1, 1, number) for number in moved[:1]]
        for number in (*moved, *range(self.given)):
            groups = self.partitions[number]
            left = [
                layout
                for layout in candidates(shape, groups.examples, axes, number)
                if (ids := evidence.ids(layout.axis, self.code)) is not None
                and fits(layout.spread(groups.ids), ids)
            ]
            left = [layout for layout in left if number in moved or self._lies(at, layout)]
            if left:
                if number in moved:
                    return left
                if not evidence.seen:
                    return self._as_below(at, left)
                return self._plain(at, left, groups.examples)
        return []

    def _as_below(self, at: At, left: list[Layout]) -> list[Layout]:
        """Keep the layouts that agree with the tensors that an output is made of.

        No probe tells them apart, so they hold until there is a gradient.
        """
        shape = self.shape(at)
        if len({split_of(shape, layout) for layout in left}) == 1:
            return left
        if at not in self._below:
            self._below[at] = inherited(self._graph, at, self._flows.inputs, self._told)
        below = self._below[at]
        split = None if below is None else split_of(shape, below)
        same = [layout for layout in left if split_of(shape, layout) == split]
        return same or left

    def _told(self, at: At) -> tuple[Layout, int] | None:
        """Return the layout that probes tell, and the number of examples."""
        evidence = self.evidence(at)
        left = self.layouts(at) if evidence is not None and evidence.seen else []
        if len({split_of(self.shape(at), layout) for layout in left}) != 1:
            return None
        return left[0], self.partitions[left[0].partition].examples

    def _lies(self, at: At, layout: Layout) -> bool:
        """Return whether a layout of a source agrees with the inputs of the model that it views.

        Where a batch has as many examples as a sequence has tokens, environments that mix may look
        like a batch in another dimension.
        """
        operand = _ROWS.get(str(self._graph.names[at[0]]))
        if operand is None or not self._flows.is_source(at[0]):
            return True
        groups, axis = self.partitions[layout.partition], layout.axis
        expected = layout.spread(groups.ids)
        tensor = saved(self._graph.nodes[at[0]], operand)
        if tensor is None or tensor.dim() <= axis or tensor.shape[axis] != self.shape(at)[axis]:
            return True
        found = self._data.examples(tensor, axis, self._batch_dim, groups.examples)
        return found is None or torch.equal(groups.ids[found], expected)

    def _plain(self, at: At, left: list[Layout], examples: int) -> list[Layout]:
        """Keep the layouts that shapes make plain, as rows without a gradient allow too many.

        If the batch dimension has the size of the batch, in the tensor or in the next one, whose
        rows are split, the batch is an axis of that size.
        """
        evidence, shape = self.evidence(at), self.shape(at)
        assert evidence is not None
        assert self.code is not None
        kept = []
        for layout in left:
            ids = evidence.ids(layout.axis, self.code)
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

    def _exact(self, shape: Sequence[int], examples: int, like: Layout) -> list[Layout]:
        if examples not in (*shape[:1], *shape[self._batch_dim :][:1]):
            return []
        sizes = enumerate(shape)
        return [Layout(axis, 1, 1, like.partition) for axis, size in sizes if size == examples]

    def prove_leaf(self, index: int) -> None:
        """Prove that environments are apart in a leaf whose rows lie in the order of the batch."""
        if self.seen(index) and self.layouts((index, 0)):
            self._flows.prove(index)

    def choose(self, at: At, axes: Sequence[int] | None) -> tuple[Layout | None, bool]:
        """Return the layout of an output (None: there is none), and whether it holds for others.

        If the probes leave several layouts, all of them treat the gradients of this graph alike.
        For another graph of the same structure they may differ.
        """
        left, evidence = self.layouts(at, axes), self.evidence(at)
        if not left:
            return self._by_row(at, axes), False
        if self.code is None:
            return left[0], True
        shape, number = self.shape(at), left[0].partition
        if len({split_of(shape, layout) for layout in left}) > 1:
            left = self._as_reshaped(at, left)
        alone = len({split_of(shape, layout) for layout in left}) == 1
        if evidence is None:
            return (left[0] if alone else None), alone
        self._flows.prove(at[0])
        ids = evidence.ids(left[0].axis, self.code)
        if ids is None or bool((ids < 0).any()) or 0 in shape:
            # Rows without a gradient fit everywhere: nodes must tell where they come from.
            alone &= self._flows.of(at) == self.flow_of(number)
            if number < self.given:
                alone &= ids is not None and len(ids[ids >= 0].unique()) > 1
        return left[0], alone

    def flow_of(self, number: int) -> Flow:
        """Return the flow of rows of a partition."""
        return Flow((number,)) if number >= self.given else GIVEN

    def _by_row(self, at: At, axes: Sequence[int] | None) -> Layout | None:
        """Return a layout by which each row belongs to the environment that the probes name.

        It holds for this pass only. None: rows do not belong to one environment each, or nothing
        tells that environments are apart.
        """
        evidence, shape = self.evidence(at), self.shape(at)
        if evidence is None or self.code is None:
            return None
        for axis in range(len(shape)) if axes is None else axes:
            ids = evidence.ids(axis, self.code) if axis < len(shape) else None
            if ids is None or not evidence.seen or not evidence.is_clear(axis):
                continue
            known = ids[ids >= 0]
            # A model may treat examples one by one. Where the batch would fit, rows of one example
            # mean that environments mix.
            single = bool((known == known[0]).all()) and not self.possible(at, None)
            if single or self._flows.is_proved(at[0]):
                self.quiet[at] = (ids < 0).nonzero()[:, 0]
                return Layout(axis, 1, 1, self.add_rows(ids.clamp(min=0)))
        return None

    def add_rows(self, ids: Tensor) -> int:
        """Add a partition, given the environment of each row; return its number."""
        assert self.code is not None
        self.partitions.append(group_rows(ids, self.code.environments))
        return len(self.partitions) - 1

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

    def view_of(self, at: At, layout: Layout | None) -> tuple[int, int] | None:
        """Return the next node if it views an output with the batch in an axis of its own, and it.

        For a batch of other sizes, that axis tells what the layout of the output is.
        """
        if layout is None or layout.size == 1:
            return None
        shape, examples = self.shape(at), self.partitions[layout.partition].examples
        for user in self._users.get(at[0], ()):
            after = self.shape((user, 0))
            if self._graph.names[user] in RESHAPES and math.prod(after) == math.prod(shape):
                for axis, size in enumerate(after):
                    one = Layout(axis, 1, 1, layout.partition)
                    if size == examples and split_of(after, one) == split_of(shape, layout):
                        return user, axis
        return None

    def is_apart(self, at: At, axes: Sequence[int] | None) -> bool:
        """Return whether each row of an output belongs to one environment, whatever its order."""
        evidence, code = self.evidence(at), self.code
        if evidence is None or code is None:
            return False
        found = range(len(evidence.shape)) if axes is None else axes
        return any(a < len(evidence.shape) and evidence.ids(a, code) is not None for a in found)
