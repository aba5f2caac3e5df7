"""Hooks of the user on tensors and modules, which must not see the probes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._notices import warn_once


class UserHooks:
    """Keeps probes from hooks of tensors and modules, and from the ``.grad`` of tensors.

    Args:
        is_probing: tells whether the backward pass that runs is a probe.
        owner: what warnings are about.
    """

    def __init__(self, is_probing: Callable[[], bool], owner: object) -> None:
        self._is_probing = is_probing
        self._owner = owner
        self._retaining: list[weakref.ref[Tensor]] = []

    def register(self, tensor: Tensor, hook: Callable[[Tensor], Any]) -> Any:
        """Stand in for ``Tensor.register_hook``."""
        return tensor.register_hook(self._gated(hook))

    def retain(self, tensor: Tensor) -> None:
        """Stand in for ``Tensor.retain_grad``."""
        tensor.retain_grad()
        if not tensor.is_leaf:
            self._retaining.append(weakref.ref(tensor))

    def _gated(self, hook: Callable[..., Any], given: int = 0) -> Callable[..., Any]:
        """Return a hook that sees no probe, but is tried once more when it first changes something.

        Args:
            hook: the hook.
            given: which of its arguments is the gradient, or gradients, that it may replace.
        """
        known = False

        def gated(*args: Any) -> Any:
            nonlocal known
            if self._is_probing():
                return None
            before = _versions(args[given])
            result = hook(*args)
            in_place = _versions(args[given]) != before
            if known or (not in_place and (result is None or result is args[given])):
                return result
            known = True
            if in_place or not _treats_rows_alone(hook, args, given, result):
                warn_once(self._owner, _OTHER_HOOK)
            return result

        return gated

    def _refused(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Return a hook of ``register_backward_hook`` that may only look."""

        def refused(*args: Any) -> Any:
            if not self._is_probing() and hook(*args) is not None:
                raise RuntimeError(
                    "Agreement: expected hooks of Module.register_backward_hook to return None, "
                    "but one returns gradients, which torch puts in the place of some that are "
                    "not used here; use register_full_backward_hook"
                )

        return refused

    @contextmanager
    def of_modules(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Let no backward hook of these modules see a probe."""
        changed: list[tuple[dict[int, Any], int, Any, Any]] = []
        for module in modules:
            full = module._is_full_backward_hook is not False
            for key, hook in module._backward_hooks.items():
                gated = self._gated(hook, 1) if full else self._refused(hook)
                changed.append((module._backward_hooks, key, hook, gated))
            for key, hook in module._backward_pre_hooks.items():
                changed.append((module._backward_pre_hooks, key, hook, self._gated(hook, 1)))
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


_OTHER_HOOK = (
    "Agreement: a hook changes gradients in place, or in proportion neither to them nor row by "
    "row. It sees those of all environments at once, divided by the size of the batch, so the "
    "result differs from one environment after the other; for hooks that clip, normalise or add "
    "noise use andmask_ext.backward; let others return a new tensor"
)


def _treats_rows_alone(hook: Callable[..., Any], args: Any, given: int, result: Any) -> bool:
    """Return whether a hook changes rows one by one, in proportion, by calling it once more."""
    others = list(args)
    others[given] = _scaled(args[given])
    with torch.no_grad():
        return _are_close(hook(*others), _scaled(result))


def _versions(gradients: Any) -> list[int]:
    tensors = gradients if isinstance(gradients, tuple) else (gradients,)
    return [tensor._version for tensor in tensors if isinstance(tensor, Tensor)]


def _scaled(gradients: Any) -> Any:
    """Return gradients whose rows are multiplied by 1 and 2 in turn."""
    if isinstance(gradients, tuple):
        return tuple(map(_scaled, gradients))
    if not isinstance(gradients, Tensor):
        return gradients
    rows = gradients.shape[0] if gradients.dim() else 1
    factors = 2 - torch.arange(rows, device=gradients.device) % 2
    return gradients * factors.view([rows, *[1] * (gradients.dim() - 1)][: gradients.dim()])


def _are_close(first: Any, second: Any) -> bool:
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(_are_close, first, second))
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.allclose(first, second, 1e-3, 0.0, equal_nan=True)
    return first is second
