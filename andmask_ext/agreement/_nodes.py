"""What single nodes of an autograd graph tell."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import Node
from torch.utils import checkpoint


def leaf(node: Node) -> Tensor:
    """Return the tensor that an AccumulateGrad node is of."""
    variable: Tensor = node.variable  # type: ignore[attr-defined]
    return variable


def shape_of(node: Node, output: int = 0) -> tuple[int, ...]:
    """Return the shape of one output of a node in the forward pass."""
    return tuple(int(size) for size in node._input_metadata[output].shape)


class _KeepHandles(dict[int, Any]):
    """The handles of a checkpointed tensor: it can be unpacked by us and by its node."""

    def __setitem__(self, task: int, handle: Any) -> None:
        if handle is not None:
            super().__setitem__(task, handle)


def saved(node: Node, name: str) -> Any:
    """Return what a node saved for its backward pass."""
    raw = getattr(node, f"_raw_saved_{name}", None)
    if raw is not None and isinstance(raw.data, checkpoint._Holder):
        raw.data.handles = _KeepHandles(raw.data.handles)
    value = getattr(node, f"_saved_{name}")
    return value.detach() if isinstance(value, Tensor) else value
