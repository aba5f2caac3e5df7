"""The context ``optimizer.environment()``: it moves gradients from ``.grad`` to the moments."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._checks import check_dense_grad
from .._pending import PendingStep

# Gradients are added to the moments in batches of about this size. They are then still in cache,
# and the cost of the call is small.
_FLUSH_BYTES = 2**19


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
        self._waiting: dict[int, tuple[list[int], list[Tensor], list[Tensor]]] = {}
        self._bytes = 0

    def __enter__(self) -> None:
        if self._received or self._pending.context is self:
            raise RuntimeError("environment: expected a new context for each environment")
        self._pending.open(self)
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
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:  # fewer passes than micro_batches, or set by hand
                    self._take(param)
        self._flush()
        if not self._received:
            raise RuntimeError(
                "environment: expected a backward pass inside that reaches a parameter of this "
                "optimizer, but none did"
            )

    def receive(self, param: Tensor) -> None:
        """Count one backward pass. After the last one, move the gradient to the moments."""
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
        check_dense_grad("environment", grad)
        param.grad = None
        self._received.setdefault(id(param), 0)
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
                sign = -1.0 if group["maximize"] else 1.0
                with torch.no_grad():
                    torch._foreach_add_(
                        grads, [p.detach() for p in params], alpha=sign * decay / self._weight
                    )
            self._pending.moments[number]._add_some(indices, grads, self._weight)
        self._waiting.clear()
        self._bytes = 0
