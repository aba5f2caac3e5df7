"""The batch axes of tensors that had no gradient in the probes: as those they are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ._flows import At
from ._graph import Graph
from ._layout import Layout, candidates, split_of
from ._nodes import saved, shape_of
from ._views import VIEWS, View, view_through


def _strided(tensor: Tensor, node: Node, output: int) -> Tensor:
    offset = int(saved(node, "storage_offset") or 0)
    return tensor.as_strided(shape_of(node, output), saved(node, "stride"), offset)


# The layout of the memory is known only as far as the views of a chain tell.
_VIEWS = {**VIEWS, "AsStridedBackward0": _strided}


def inherited(
    graph: Graph,
    at: At,
    inputs: Callable[[int], Sequence[At]],
    known: Callable[[At], tuple[Layout, int] | None],
) -> Layout | None:
    """Return the batch axis of an output; None: what it is made of does not tell.

    Only a gradient can prove it, as an operation may do with its input what it likes.

    Args:
        graph: the graph of the output.
        at: the output.
        inputs: returns the data that enter a node.
        known: returns the batch axis of an output, and the number of examples, if probes tell it.
    """
    path = [at]
    found = None
    while found is None:
        below = inputs(path[-1][0])
        if not below:
            return None
        path.append(below[0])
        found = known(below[0])
    layouts, examples = [found[0]], found[1]
    path.reverse()
    for number in range(1, len(path)):
        layout = None
        for first in range(number - 1, -1, -1):
            chain = [(graph.nodes[index], output) for index, output in path[first + 1 : number + 1]]
            if chain[0][0].name() not in _VIEWS:
                break
            layout = _as_viewed(chain, _shape(graph, path[first]), layouts[first], examples)
            if layout is not None:
                break
        layout = layout or _as_input(graph, path[number - 1], path[number], layouts[-1])
        if layout is None:
            return None
        layouts.append(layout)
    return layouts[-1]


def _shape(graph: Graph, at: At) -> tuple[int, ...]:
    return shape_of(graph.nodes[at[0]], at[1])


def _as_input(graph: Graph, large: At, small: At, layout: Layout) -> Layout | None:
    """Return the batch axis of an output, given that of its input, if shapes say it is the same."""
    before, after, axis = _shape(graph, large), _shape(graph, small), layout.axis
    same = len(after) == len(before) or after[:axis] == before[:axis]
    return layout if same and after[axis : axis + 1] == before[axis : axis + 1] else None


def _as_viewed(
    chain: Sequence[tuple[Node, int]], shape: Sequence[int], layout: Layout, examples: int
) -> Layout | None:
    """Return the batch axis of a view, given that of the tensor it views, taken as contiguous."""
    view = view_through(chain, shape, _VIEWS)
    if view is None:
        return None
    found = candidates(view.size, examples, None, layout.partition)
    fitting = [one for one in found if _agrees(view, shape, layout, one, examples)]
    alone = len({split_of(view.size, one) for one in fitting}) == 1
    return fitting[0] if alone else None


def _agrees(view: View, shape: Sequence[int], layout: Layout, one: Layout, examples: int) -> bool:
    """Return whether a view has a batch axis, given that of the contiguous tensor it views."""
    behind = split_of(shape, layout)[1]

    def owners(axis: int) -> Tensor:
        places = view.offset + view.stride[axis] * torch.arange(view.size[axis])
        return places // behind % examples

    return all(
        torch.equal(owners(axis), one.spread(torch.arange(examples)))
        if axis == one.axis
        else bool((owners(axis) == owners(axis)[0]).all())
        for axis in range(len(view.size))
    )
