"""The steps whose contexts are open: what must not happen to their parameters meanwhile."""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from ._tracked import Tracked


class _Step(Protocol):
    tracked: Tracked


class _Opened:
    """The open steps. While there are any, torch calls ``refuse_step`` before each step."""

    def __init__(self) -> None:
        self._steps: weakref.WeakSet[_Step] = weakref.WeakSet()
        self._handle: RemovableHandle | None = None
        self._lock = threading.Lock()

    def add(self, step: _Step) -> None:
        """Add a step whose context opens.

        Raises:
            RuntimeError: another open context takes the gradient of one of its parameters.
        """
        with self._lock:
            if self._steps:
                self._refuse_shared(step)
            self._steps.add(step)
            if self._handle is None:
                self._handle = register_optimizer_step_pre_hook(self._refuse_step)

    def remove(self, step: _Step) -> None:
        """Remove a step whose context has ended."""
        with self._lock:
            self._steps.discard(step)
            if not self._steps and self._handle is not None:
                self._handle.remove()
                self._handle = None

    def _refuse_shared(self, step: _Step) -> None:
        mine = step.tracked.may_get_grads()
        for other in self._steps:
            for key in other.tracked.may_get_grads().keys() & mine.keys():
                raise RuntimeError(
                    f"environment: {step.tracked.name(mine[key])} belongs to another optimizer or "
                    "Agreement, too, whose context is open; expected one of them, as a gradient "
                    "can go to one only; give the parameter to one optimizer, or open one context "
                    "after the other, each with a backward pass of its own"
                )

    def _refuse_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for step in list(self._steps):
            mine = step.tracked.may_get_grads()
            theirs = (param for group in optimizer.param_groups for param in group["params"])
            for param in theirs:
                if id(param) in mine:
                    raise RuntimeError(
                        "step: expected to be called outside of an environment, but got "
                        f"{type(optimizer).__name__}.step() while an open context takes the "
                        f"gradient of {step.tracked.name(param)}; call it after the `with` block"
                    )


opened = _Opened()
