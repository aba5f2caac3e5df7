"""Records the calls of the model: the batch sizes, inputs and outputs."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
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
from ._data import DataRecord, Origin, tensors_in


def uses_batch(module: _BatchNorm) -> bool:
    """Return whether a layer takes statistics over all environments."""
    return (module.training or module.running_mean is None) and not isinstance(
        module, PerEnvironment
    )


@dataclass
class Call:
    """A call of the model, or of a part of it, from outside of the model."""

    inputs: list[Tensor]
    outputs: list[Tensor]

    def examples(self, batch_dim: int) -> int | None:
        """Return the size of the batch; None: no tensor has the batch dimension.

        It is the size that an input shares with all outputs, else that of the first input that is
        not broadcast (of size 1).
        """
        sizes = [t.shape[batch_dim] for t in self.inputs if t.dim() > batch_dim]
        returned = {t.shape[batch_dim] for t in self.outputs if t.dim() > batch_dim}
        if not sizes:
            return returned.pop() if len(returned) == 1 else None
        first = next((size for size in sizes if size != 1), 1)
        if len(returned) == 1:
            (shared,) = returned
            if shared in sizes and shared != 1:
                return shared
        return first


class ForwardRecorder:
    """Hooks while the context is open: on all modules, and one on the model for its keywords.

    Args:
        model: the model.
        members: the ids of the model's modules, including the model.
        batch_dim: the batch dimension of inputs and outputs.
        data: is told of the inputs before the call.
        rows: the number of rows that the user gave the environments of; 0: none.

    Attributes:
        calls: the calls from outside since :meth:`clear`, of the model or of its modules.
        batch_norms: the modules that took batch statistics since :meth:`clear`.
        stale: whether there was a backward pass since the last call.
    """

    def __init__(
        self, model: nn.Module, members: set[int], batch_dim: int, data: DataRecord, rows: int
    ) -> None:
        self._model = model
        self._members = members
        self._data = data
        self._rows = rows
        self.batch_dim = batch_dim
        self._depth = 0
        self.stale = False
        self.paused = False  # during a backward pass, which may call modules
        self._handles: list[Any] = []
        self.calls: list[Call] = []
        self.batch_norms: list[nn.Module] = []
        self._held: list[weakref.ref[Tensor]] = []

    def __enter__(self) -> None:
        self._handles = [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        if not isinstance(self._model, torch.jit.ScriptModule):  # it takes no such hooks
            hook = self._model.register_forward_pre_hook(self._before_model, with_kwargs=True)
            self._handles.append(hook)

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
        self.stale = True
        self._held = [weakref.ref(tensor) for tensor in self.outputs()]
        for call in self.calls:
            call.outputs = []

    def clear(self) -> None:
        """Forget all records."""
        self.stale = False
        self.batch_norms = []
        self.calls, self._held = [], []

    def _before(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():  # what is compiled is one function of its inputs
            return
        if id(module) in self._members and not self.paused:
            if self._depth == 0:
                if self.stale:
                    self.clear()
                if module is not self._model or isinstance(module, torch.jit.ScriptModule):
                    self._take(tensors_in(args))
            self._depth += 1
            if isinstance(module, _BatchNorm) and uses_batch(module):
                self.batch_norms.append(module)

    def _before_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self._depth == 1 and not self.paused:  # hooks on all modules do not see the keywords
            self._take(tensors_in((args, kwargs)))

    def _take(self, inputs: list[Tensor]) -> None:
        """Record inputs as data. One that is broadcast over the batch may hold constants."""
        with torch._C.DisableTorchFunction():  # else each attribute is a call of BackwardMode
            announce(inputs, self.batch_dim)
            single = [
                tensor.dim() > self.batch_dim and tensor.shape[self.batch_dim] == 1
                and self._rows not in tensor.shape
                for tensor in inputs
            ]  # fmt: skip
            broadcast = not all(single)
            for tensor, one in zip(inputs, single, strict=True):
                self._data.take([tensor], Origin.UNKNOWN if one and broadcast else Origin.DATA)

    def _after(self, module: nn.Module, args: Any, *rest: Any) -> None:
        """Record the inputs and outputs of a module. If it raised, only note that it ended."""
        if torch.compiler.is_compiling() or id(module) not in self._members or self.paused:
            return
        self._depth -= 1
        if self._depth or not torch.is_grad_enabled() or len(rest) < 2:
            return
        kwargs, output = rest
        outputs = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
        self.calls.append(Call(tensors_in((args, kwargs)), outputs))

    def sizes(self) -> list[int]:
        """Return the sizes of the batches of the calls since :meth:`clear`, each once."""
        sizes = [call.examples(self.batch_dim) for call in self.calls]
        return list(dict.fromkeys(size for size in sizes if size is not None))

    def all_sizes(self) -> set[int]:
        """Return the size of every dimension of the inputs and outputs."""
        return {size for one in (*self.inputs(), *self.outputs()) for size in one.shape}

    def outputs(self) -> list[Tensor]:
        """Return the output tensors of the calls since :meth:`clear`."""
        made = [tensor for call in self.calls for tensor in call.outputs]
        return made + [tensor for ref in self._held if (tensor := ref()) is not None]

    def inputs(self) -> list[Tensor]:
        """Return the input tensors of the calls since :meth:`clear`."""
        return [tensor for call in self.calls for tensor in call.inputs]
