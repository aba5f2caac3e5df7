"""The context ``optimizer.environment()``: it moves gradients from ``.grad`` to the moments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any, Concatenate, Generic, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._checks import check_dense_grad
from .._pending import PendingStep

# Gradients are added to the moments in batches of about this size. They are then still in cache,
# and the cost of the call is small.
_FLUSH_BYTES = 2**19


P = ParamSpec("P")
R = TypeVar("R")


class _Uncalled(Generic[P, R]):
    """A bound method. As a context it says that the parentheses are missing."""

    def __init__(self, method: Callable[P, R]) -> None:
        functools.update_wrapper(self, method)
        self._method = method

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._method(*args, **kwargs)

    def __enter__(self) -> NoReturn:
        name = getattr(self._method, "__name__", "")
        raise TypeError(f"{name}: expected `with optimizer.{name}():`, with parentheses")

    def __exit__(self, *_: object) -> None:
        """Nothing: it cannot be entered."""


class ContextMethod(Generic[P, R]):
    """A method that returns a context, and complains in words where it is not called."""

    def __init__(self, method: Callable[Concatenate[Any, P], R]) -> None:
        self._method = method

    def __get__(self, owner: object, kind: type | None = None) -> _Uncalled[P, R]:
        if owner is None:
            return self._method  # type: ignore[return-value]  # for documentation
        return _Uncalled(self._method.__get__(owner))


class Environment:
    """The context of one environment.

    Args:
        pending: the step that the environment belongs to.
        optimizer: the owner of the step. Its groups give the weight decay before the mask.
        weight: a factor for the gradient.
        micro_batches: the number of backward passes; None: any number.
        grad_scaler: the scaler that scaled the loss.
    """

    def __init__(
        self,
        pending: PendingStep,
        optimizer: Optimizer,
        weight: float,
        micro_batches: int | None,
        grad_scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.grad_scaler = grad_scaler
        self._pending = pending
        self._optimizer = optimizer
        self._weight = weight
        self._micro_batches = micro_batches
        self._received: dict[int, int] = {}  # id of a parameter -> number of backward passes
        self._taken: set[int] = set()
        self._waiting: dict[int, tuple[list[int], list[Tensor], list[Tensor]]] = {}
        self._bytes = 0
        self._entered = False

    @property
    def started(self) -> bool:
        """Whether a gradient has arrived."""
        return bool(self._received)

    def __enter__(self) -> None:
        if self._entered:
            raise RuntimeError("environment: expected a new context for each environment")
        self._pending.open(self)
        self._entered = True
        if self.grad_scaler is not None:
            self._weight /= self.grad_scaler.get_scale()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        complete = False
        try:
            if kind is None:
                self._take_all()
                self._pending.add_environments(1)
                self._pending.close()
                complete = True
        finally:
            if not complete:
                self._pending.abandon(changed=True)

    def _take_all(self) -> None:
        for param in self._pending.tracked.params:
            if param.grad is not None:  # fewer passes than micro_batches, or set by hand
                self._take(param)
        self._flush()

    def receive(self, param: Tensor) -> None:
        """Count one backward pass. After the last one, move the gradient to the moments."""
        if param.grad is None:
            raise RuntimeError(
                f"environment: the gradient of {self._pending.tracked.name(param)} was gone before "
                "it could be taken; expected no hook of register_post_accumulate_grad_hook that "
                "sets .grad to None, such as an optimizer in backward; remove it, and call "
                "optimizer.step() after the environments"
            )
        passes = self._received.get(id(param), 0) + 1
        self._received[id(param)] = passes
        if self._micro_batches is None:
            return
        if passes > self._micro_batches:
            raise RuntimeError(
                f"environment: expected {self._micro_batches} backward pass(es) to reach a "
                f"parameter of shape {tuple(param.shape)}, but got one more; pass their number, "
                "environment(micro_batches=...), or None for any number (as with "
                "reentrant checkpointing)"
            )
        if passes == self._micro_batches:
            self._take(param)

    def _take(self, param: Tensor) -> None:
        grad = param.grad
        assert grad is not None
        if id(param) in self._taken:
            raise RuntimeError(
                f"environment: {self._pending.tracked.name(param)} got a .grad after its gradient "
                "had been taken, as DistributedDataParallel writes one when it has averaged; use "
                "environment(micro_batches=None), where each environment is spread over all "
                "processes and DistributedDataParallel averages it, or run the forward and "
                "backward pass inside model.no_sync(), where each process has environments of its "
                "own"
            )
        self._taken.add(id(param))
        check_dense_grad("environment", grad)
        param.grad = None
        group, index = self._pending.slots[id(param)]
        indices, params, grads = self._waiting.setdefault(group, ([], [], []))
        indices.append(index)
        params.append(param)
        grads.append(grad)
        self._bytes += grad.nbytes
        if self._bytes >= _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        for number, (indices, params, grads) in self._waiting.items():
            group = self._optimizer.param_groups[number]
            decay = group.get("weight_decay", 0.0)
            if decay and group.get("weight_decay_mode") == "before_mask":
                scale = float(decay) / self._weight
                sign = -1.0 if group["maximize"] else 1.0
                with torch.no_grad():
                    torch._foreach_add_(
                        grads,
                        [p.detach() for p in params],
                        alpha=sign * scale,
                    )
            self._pending.moments[number]._add_some(indices, grads, self._weight)
        self._waiting.clear()
        self._bytes = 0
