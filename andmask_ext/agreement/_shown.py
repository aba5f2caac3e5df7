"""Data that require no gradients, and whose rows are moved."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.autograd.graph import Node


class ShownData:
    """Lets autograd record functions that move rows of data.

    Of data that require no gradients, as the input of a packed sequence, autograd records nothing,
    and nothing would tell which example a row is. So such a function gets a leaf that requires
    gradients. Regions under checkpointing are left alone: they are computed again without this.
    """

    def __init__(self) -> None:
        self._leaves: dict[int, Tensor] = {}  # by id

    def __contains__(self, node: Node) -> bool:
        """Whether a node is that of such a leaf."""
        return id(getattr(node, "variable", None)) in self._leaves

    def wants(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Return whether a function of :data:`MOVING` moves rows that autograd does not see."""
        first = args[0] if args else None
        return (
            isinstance(first, Tensor)
            and not first.requires_grad
            and (first.is_floating_point() or first.is_complex())
            and torch.is_grad_enabled()
            and not first.is_inference()
            and not (kwargs and kwargs.get("out") is not None)
            and not (func is Tensor.__getitem__ and not picks_by_index(args[1]))
            and _top_saved_tensors_default_hooks(True) is None
            and torch._C._functorch.peek_interpreter_stack() is None  # vmap and its like
        )

    def show(self, args: Any) -> Any:
        """Return the arguments with which autograd records the function."""
        leaf = args[0].data.requires_grad_()  # its versions are its own: only sizes are used
        self._leaves[id(leaf)] = leaf
        return (leaf, *args[1:])

    def hide(self, args: Any) -> Any:
        """Return arguments of a function that takes no tensor that requires gradients."""
        if not self._leaves:
            return args
        return tuple(
            one.detach() if isinstance(one, Tensor) and one.requires_grad else one for one in args
        )

    def release(self, modules: Iterable[nn.Module]) -> None:
        """Let go of buffers that were made of shown data only, which required no gradients."""
        for module in modules if self._leaves else ():
            for name, buffer in module._buffers.items():
                if buffer is None or buffer.grad_fn is None or not self._is_all(buffer.grad_fn):
                    continue
                if buffer._is_view():
                    module._buffers[name] = buffer.detach()
                else:
                    buffer.detach_()
        self._leaves = {}

    def _is_all(self, root: Node) -> bool:
        """Return whether a node is made of shown data only."""
        stack, seen = [root], {root}
        while stack:
            node = stack.pop()
            if not node.next_functions and node not in self:
                return False
            following = {after for after, _ in node.next_functions if after is not None} - seen
            seen |= following
            stack += following
        return True


def picks_by_index(index: Any) -> bool:
    """Return whether an index holds a tensor, a list or an array."""
    return not all(type(one) in _BASIC for one in (index if type(index) is tuple else (index,)))


_BASIC = frozenset((int, slice, type(None), type(Ellipsis)))
