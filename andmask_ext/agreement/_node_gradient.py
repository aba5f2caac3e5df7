"""The gradient that has arrived at a node, and its batch axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from ._contributions import Stacked, ids_of_axis
from ._groups import Groups
from ._layout import Layout, environment_sum
from ._nodes import saved


@dataclass
class NodeGradient:
    """The gradients of a node's outputs.

    Attributes:
        node: the node.
        deltas: the gradient of each of its outputs.
        layouts: the batch axis of each; None: it has none.
        partitions: the partitions that the layouts name. The first is that of the batch.
    """

    node: Node
    deltas: tuple[Tensor | None, ...]
    layouts: tuple[Layout | None, ...]
    partitions: Sequence[Groups]

    @property
    def groups(self) -> Groups:
        """The environments of the rows of the only output."""
        layout = self.layouts[0]
        return self.partitions[0 if layout is None else layout.partition]

    @property
    def delta(self) -> Tensor:
        """The gradient of the only output."""
        delta = self.deltas[0]
        assert delta is not None
        return delta

    @property
    def layout(self) -> Layout:
        """The batch axis of the only output."""
        layout = self.layouts[0]
        assert layout is not None
        return layout

    def saved(self, name: str) -> Any:
        """Return what the node saved for its backward pass."""
        return saved(self.node, name)

    def rows(self, matrix: Tensor) -> Tensor:
        """Return ``[examples, rows of each, columns]`` of a matrix with examples in its rows."""
        return self.layout.rows(matrix, self.groups.examples)

    def summed(self, products: Tensor, shape: tuple[int, ...]) -> Stacked | None:
        """Sum products of the output's shape per environment, to an operand of this shape."""
        grads = environment_sum(products, self.layout, self.groups, shape)
        return None if grads is None else Stacked(grads, shape)


def environments_of(layout: Layout, groups: Groups, like: Tensor) -> Tensor:
    """Return the environment of each element of ``like``, in its shape."""
    ids = ids_of_axis(groups, layout).to(like.device)
    shape = [1] * like.dim()
    shape[layout.axis] = len(ids)
    return ids.view(shape).expand(like.shape)
