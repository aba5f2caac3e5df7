"""Records the calls of the model: the batch sizes, inputs and outputs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from ._current import PerEnvironment, announce


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested lists, tuples, dicts and dataclass-like objects."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            yield value
            continue
        if isinstance(value, (str, int, float, type, nn.Module)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            stack += list(value.values())[::-1]
        elif isinstance(value, (list, tuple)):
            stack += value[::-1]
        elif hasattr(value, "__dict__"):
            kinds = (Tensor, list, tuple, dict)
            stack += [item for item in vars(value).values() if isinstance(item, kinds)][::-1]


def uses_batch(module: _BatchNorm) -> bool:
    """Return whether a layer takes statistics over all environments."""
    return (module.training or module.running_mean is None) and not isinstance(
        module, PerEnvironment
    )


class ForwardRecorder:
    """Hooks while the context is open: on all modules, and one on the model for its keywords.

    Args:
        model: the model.
        members: the ids of the model's modules, including the model.
        batch_dim: the batch dimension of inputs and outputs.

    Attributes:
        sizes: the batch sizes of calls from outside since :meth:`clear`, of the model or of its
            modules.
        batch_norms: the modules that took batch statistics since :meth:`clear`.
        inputs: the input tensors of these calls.
    """

    def __init__(self, model: nn.Module, members: set[int], batch_dim: int) -> None:
        self._model = model
        self._members = members
        self.batch_dim = batch_dim
        self._depth = 0
        self._stale = False  # a backward pass has been run since
        self.paused = False  # during a backward pass, which may call modules
        self._handles: list[Any] = []
        self.sizes: set[int] = set()
        self.batch_norms: list[nn.Module] = []
        self.inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._held: list[weakref.ref[Tensor]] = []

    def __enter__(self) -> None:
        self._handles = [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after, with_kwargs=True, always_call=True),
            self._model.register_forward_pre_hook(self._before_model, with_kwargs=True),
        ]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
            _global_forward_hooks_with_kwargs.pop(handle.id, None)  # torch forgets to
        self.clear()

    def passed(self) -> None:
        """Mark a backward pass as done: the next call of the model begins a new forward pass.

        The records stay until then, as another backward pass may use the same outputs.
        """
        self._stale = True
        self._held = [weakref.ref(tensor) for tensor in self.outputs()]
        self._outputs = []

    def clear(self) -> None:
        """Forget all records."""
        self._stale = False
        self.batch_norms = []
        self.sizes = set()
        self.inputs, self._outputs, self._held = [], [], []

    def _before(self, module: nn.Module, args: Any) -> None:
        if id(module) in self._members and not self.paused:
            if self._depth == 0:
                if self._stale:
                    self.clear()
                announce(tensors_in(args), self.batch_dim)
            self._depth += 1
            if isinstance(module, _BatchNorm) and uses_batch(module):
                self.batch_norms.append(module)

    def _before_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._depth == 1 and not self.paused:  # hooks on all modules do not see the keywords
            announce(tensors_in(kwargs), self.batch_dim, again=True)

    def _after(self, module: nn.Module, args: Any, *rest: Any) -> None:
        """Record the inputs and outputs of a module. If it raised, only note that it ended."""
        if id(module) not in self._members or self.paused:
            return
        self._depth -= 1
        if self._depth or not torch.is_grad_enabled() or len(rest) < 2:
            return
        kwargs, output = rest
        inputs = list(tensors_in((args, kwargs)))
        for tensor in inputs:
            if tensor.dim() > self.batch_dim:
                self.sizes.add(tensor.shape[self.batch_dim])
                break
        self.inputs += inputs
        self._outputs += [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]

    def outputs(self) -> list[Tensor]:
        """Return the output tensors of the calls since :meth:`clear`."""
        return self._outputs + [tensor for ref in self._held if (tensor := ref()) is not None]

    def anchors(self, examples: int) -> list[Tensor]:
        """Return the outputs that hold the batch."""
        return [
            tensor
            for tensor in self.outputs()
            if tensor.dim() > self.batch_dim
            and tensor.shape[self.batch_dim] == examples
            and tensor.is_floating_point()
        ]
