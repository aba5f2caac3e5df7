"""Hooks on parameters: they pass complete gradients to the open context."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ._parts import Context


class _Step(Protocol):
    context: Context | None


class Hook:
    """Passes a complete gradient to the open context, if there is one.

    It holds no strong reference to the step. A copied or pickled hook does nothing.
    """

    def __init__(self, step: _Step | None) -> None:
        self._step = None if step is None else weakref.ref(step)

    def __call__(self, param: Tensor) -> None:
        step = None if self._step is None else self._step()
        if step is not None and step.context is not None:
            step.context.receive(param)

    def __reduce__(self) -> tuple[type[Hook], tuple[None]]:
        return Hook, (None,)


class Hooks:
    """The hooks of one step, one on each parameter that requires a gradient."""

    def __init__(self, step: _Step) -> None:
        self._hook = Hook(step)
        self._handles: dict[int, RemovableHandle] = {}

    def attach(self, params: Iterable[Tensor]) -> None:
        """Attach what is missing, and let each hook run last.

        A hook of the user then sees the gradient before it is moved to the moments. Torch runs
        hooks in the order of the dict, which ``OrderedDict.move_to_end`` does not change.
        """
        for param in params:
            if not param.requires_grad:
                continue
            handle = self._handles.get(id(param))
            if handle is not None:
                hooks = param._post_accumulate_grad_hooks or {}
                if next(reversed(hooks), None) == handle.id:
                    continue
                handle.remove()
            self._handles[id(param)] = param.register_post_accumulate_grad_hook(self._hook)

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()


def show_to_hooks(grads: Iterable[tuple[Tensor, Tensor]], name: Callable[[Tensor], str]) -> None:
    """Call the hooks of parameters (``Tensor.register_hook``) with aggregated gradients.

    Args:
        grads: parameters and their aggregated gradients.
        name: returns the name of a parameter for messages.

    Raises:
        RuntimeError: a hook returned a gradient, so it is more than a record.
    """
    for param, grad in grads:
        for hook in list((param._backward_hooks or {}).values()):
            if hook(grad) is not None:
                raise RuntimeError(
                    f"Agreement: {name(param)} has a hook "
                    "(Tensor.register_hook) that returns a gradient, so it would have to change "
                    "the gradient of each environment; expected one that returns None, which sees "
                    "the aggregated gradient; change .grad after the context, or use "
                    "optimizer.environment() or andmask_ext.backward"
                )
