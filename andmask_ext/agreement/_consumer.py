"""A node that joins parameters with data, and how its gradients belong to environments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ._graph import Graph, Operand
from ._groups import Groups
from ._layout import Layout
from ._nodes import shape_of


@dataclass(frozen=True)
class Consumer:
    """A node that joins parameters with data.

    Attributes:
        index: the index of the node.
        name: its type.
        operands: its inputs that are computed from parameters only.
        layouts: the batch axis of each of its outputs; None: it has none.
        unseen: no probe had a gradient here, so a gradient is an error, or in a later pass a reason
            to make the plan again.
        quiet: for each output, the rows along the batch axis that had none in any probe, if the
            probes alone tell whose rows they are. None: all may have one.
        shared: the operands are terms of the loss. Each environment has them in full.
        views: for each output whose batch axis holds more than the batch, the next node, whose
            axes are apart, and the axis of the batch there; None: there is no such node.
    """

    index: int
    name: str
    operands: tuple[Operand, ...]
    layouts: tuple[Layout | None, ...]
    unseen: bool = False
    quiet: tuple[Tensor | None, ...] = ()
    shared: bool = False
    views: tuple[tuple[int, int] | None, ...] = ()

    def is_new(self, deltas: Sequence[Tensor | None]) -> bool:
        """Return whether there is a gradient where no probe had one."""
        if self.unseen:
            return any(delta is not None and bool(delta.any()) for delta in deltas)
        return any(
            delta is not None and layout is not None and rows is not None
            and bool(delta.index_select(layout.axis, rows.to(delta.device)).any())
            for delta, layout, rows in zip(deltas, self.layouts, self.quiet, strict=False)
        )  # fmt: skip

    def at(self, graph: Graph, partitions: Sequence[Groups]) -> Consumer | None:
        """Return this consumer for a graph of other sizes; None: the plan must be made again."""
        node = graph.nodes[self.index]
        now: list[Layout | None] = []
        for output, layout in enumerate(self.layouts):
            if layout is not None:
                size = shape_of(node, output)[layout.axis]
                examples = partitions[layout.partition].examples
                if size != layout.size * examples:
                    found = self._as_viewed(graph, output, layout, examples)
                    if found is None:
                        return None
                    layout = found
            now.append(layout)
        operands = tuple(graph.operand(self.index, operand.edge) for operand in self.operands)
        return replace(self, operands=operands, layouts=tuple(now))

    def _as_viewed(self, graph: Graph, output: int, old: Layout, examples: int) -> Layout | None:
        view = self.views[output] if self.views else None
        if view is None:
            return None
        shape, after = shape_of(graph.nodes[self.index], output), shape_of(graph.nodes[view[0]])
        if after[view[1]] != examples:
            return None
        before = math.prod(after[: view[1]]) // max(1, math.prod(shape[: old.axis]))
        behind = math.prod(after[view[1] + 1 :]) // max(1, math.prod(shape[old.axis + 1 :]))
        fits = before * examples * behind == shape[old.axis]
        return replace(old, before=before, after=behind) if fits else None
