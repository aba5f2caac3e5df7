"""Hooks of the user on tensors and modules, which must not see the probes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class UserHooks:
    """Keeps probes from hooks of tensors and modules, and from the ``.grad`` of tensors.

    Args:
        is_probing: tells whether the backward pass that runs is a probe.
    """

    def __init__(self, is_probing: Callable[[], bool]) -> None:
        self._is_probing = is_probing
        self._retaining: list[weakref.ref[Tensor]] = []

    def register(self, tensor: Tensor, hook: Callable[[Tensor], Any]) -> Any:
        """Stand in for ``Tensor.register_hook``."""
        return tensor.register_hook(self._gated(hook))

    def retain(self, tensor: Tensor) -> None:
        """Stand in for ``Tensor.retain_grad``."""
        tensor.retain_grad()
        if not tensor.is_leaf:
            self._retaining.append(weakref.ref(tensor))

    def _gated(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def gated(*args: Any) -> Any:
            return None if self._is_probing() else hook(*args)

        return gated

    @contextmanager
    def of_modules(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Let no backward hook of these modules see a probe."""
        changed: list[tuple[dict[int, Any], int, Any, Any]] = []
        for module in modules:
            for registry in (module._backward_hooks, module._backward_pre_hooks):
                for key, hook in registry.items():
                    changed.append((registry, key, hook, self._gated(hook)))
        for registry, key, _, gated in changed:
            registry[key] = gated
        try:
            yield
        finally:
            for registry, key, hook, gated in changed:
                if registry.get(key) is gated:
                    registry[key] = hook

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Keep the ``.grad`` of tensors that retain it."""
        tensors = [tensor for one in self._retaining if (tensor := one()) is not None]
        before = [tensor.grad for tensor in tensors]
        try:
            yield
        finally:
            for tensor, grad in zip(tensors, before, strict=True):
                tensor.grad = grad
