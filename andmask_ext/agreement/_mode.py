"""Redirection of the backward passes inside the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from .._switches import Switches
from ._data import DataRecord
from ._engine import Engine
from ._nodes import BACKWARDS
from ._picks import BATCH_SIZES
from ._user_hooks import UserHooks
from ._writes import say_steps


class Backward(Protocol):
    """The replacement of ``torch.autograd.backward``."""

    data: DataRecord
    hooks: UserHooks
    engine: Engine

    def backward(self, roots: list[Tensor], grads: list[Tensor], retain_graph: bool) -> None:
        """Run a backward pass."""


# Functions that return no tensor, and yet matter to what is made of data.
_AS_ARRAY = frozenset((Tensor.numpy, Tensor.__array__, Tensor.__dlpack__))
_NOTED = _AS_ARRAY | {Tensor.__setitem__, Tensor.item, Tensor.tolist}
# Functions that copy rows of their first argument to other places.
_MOVING = frozenset(
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in ("__getitem__", "_pack_padded_sequence", "flip", "fliplr", "flipud", "gather",
                 "index_select", "masked_select", "roll", "take", "take_along_dim")
    if hasattr(owner, name)
)  # fmt: skip
_RECURRENT = frozenset(
    (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
)  # their fused kernels hide the steps from autograd


_WITHOUT_FUSED_KERNELS = Switches(
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled, False),
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled, False),
)


# What torch.compile compiles inside the context must be able to run its backward pass twice.
_WITHOUT_DONATED_BUFFERS = Switches((
    lambda: bool(functorch_config.donated_buffer),
    lambda value: setattr(functorch_config, "donated_buffer", value),
    False,
))  # fmt: skip


class BackwardMode(TorchFunctionMode):
    """Redirects ``torch.autograd.backward`` to its replacement."""

    def __init__(self, backward_pass: Backward) -> None:
        super().__init__()
        self._backward_pass = backward_pass
        backward_pass.engine.mode = self

    def __enter__(self) -> BackwardMode:
        others = _get_current_function_mode_stack()
        if any(isinstance(one, BackwardMode) and one is not self for one in others):
            raise RuntimeError(
                "Agreement: expected one open context at a time, but another one is open around "
                "it; open one after the other, each with its own backward pass, or give both parts "
                "of the model to one optimizer with several parameter groups"
            )
        _WITHOUT_DONATED_BUFFERS.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _WITHOUT_DONATED_BUFFERS.__exit__(*error)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if torch.compiler.is_compiling():  # torch.compile traces this: see only what it makes
            return func(*args, **(kwargs or {}))
        if func in BACKWARDS:
            return _call_backward(self._backward_pass, *args, **(kwargs or {}))
        if func is Tensor.register_hook:
            return self._backward_pass.hooks.register(*args, **(kwargs or {}))
        if func is Tensor.retain_grad:
            return self._backward_pass.hooks.retain(*args)
        if func in _MOVING:
            data = self._backward_pass.data
            if data.shown.wants(func, args, kwargs) and data.holds_tensor(args[0]):
                args = data.shown.show(args)
        elif func in _AS_ARRAY or (kwargs and kwargs.get("out") is not None):
            args = self._backward_pass.data.shown.hide(args)
        if func in _RECURRENT:
            with _WITHOUT_FUSED_KERNELS:
                result = func(*args, **(kwargs or {}))
        else:
            result = func(*args, **kwargs) if kwargs else func(*args)
        made = isinstance(result, (Tensor, tuple, list)) and type(result) is not torch.Size
        if made or func in _NOTED:
            name = getattr(func, "__name__", "")
            self._backward_pass.data.note(name, result, args, kwargs)
            if name == "_pack_padded_sequence" and result[0].grad_fn is not None:
                result[0].grad_fn.metadata[BATCH_SIZES] = result[1]  # the node keeps it to itself
            elif name == "_pad_packed_sequence":  # it fills a tensor, step by step
                say_steps(result[0], str(args[1].tolist()))
        return result


def _call_backward(
    backward_pass: Backward,
    tensors: Tensor | Sequence[Tensor],
    grad_tensors: Tensor | Sequence[Tensor | None] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
    *,
    gradient: Tensor | None = None,
) -> None:
    if create_graph or inputs is not None or grad_variables is not None:
        raise RuntimeError(
            "Agreement: expected a plain loss.backward() inside the context, but got "
            "create_graph, inputs or grad_variables"
        )
    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    starts = gradient if gradient is not None else grad_tensors
    grads = [starts] if starts is None or isinstance(starts, Tensor) else list(starts)
    if len(grads) == 1 and grads[0] is None:
        grads = [None] * len(roots)
    for root, grad in zip(roots, grads, strict=True):
        if grad is None and root.numel() != 1:
            raise RuntimeError(
                "Agreement: expected a scalar loss, or its gradient, but got an output of shape "
                f"{tuple(root.shape)}"
            )
    live = [
        (root, torch.ones_like(root) if grad is None else grad.detach())
        for root, grad in zip(roots, grads, strict=True)
        if root.requires_grad
    ]
    if not live:
        raise RuntimeError("Agreement: expected a loss that requires gradients, but none does")
    try:
        backward_pass.backward([r for r, _ in live], [g for _, g in live], bool(retain_graph))
    except RuntimeError as error:
        if "selective activation checkpoint" not in str(error):
            raise
        raise RuntimeError(
            "Agreement: expected regions of torch.utils.checkpoint without context_fn, but got one "
            "with it: selective checkpointing allows one backward pass, and the check for mixing "
            "takes more; leave out context_fn, or use andmask_ext.backward, or, if verify() has "
            "passed without context_fn, check_mixing='never'"
        ) from error
