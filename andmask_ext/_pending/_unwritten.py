"""Stand-ins for ``.grad`` after the last environment: they are written when they are read."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class UnwrittenGrad(Tensor):
    """Stands in ``.grad`` for an aggregated gradient. It has no memory.

    The first operation on any stand-in of a step writes all of its gradients to ``.grad``. So
    clipping works wherever a loop has it, and a step whose gradients nobody reads writes none.
    """

    _places: weakref.ref[UnwrittenGrads]
    _key: int
    _grad: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, param: Tensor, places: UnwrittenGrads) -> UnwrittenGrad:
        """Return the stand-in of the gradient of a parameter."""
        made: UnwrittenGrad = Tensor._make_wrapper_subclass(
            cls, param.size(), strides=param.stride(), dtype=param.dtype, device=param.device
        )
        made._places, made._key, made._grad = weakref.ref(places), id(param), None
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(UnwrittenGrad, UnwrittenGrad._written, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _written(self) -> Tensor:
        places = self._places()
        if torch._C._current_autograd_node() is not None:
            if places is not None:
                places.excuse()
            raise RuntimeError(
                f".grad: a backward pass outside of an environment has reached a parameter of "
                f"shape {tuple(self.shape)} that has environments since the last step; expected "
                "`with optimizer.environment():` around it, or optimizer.step() before it, or the "
                "parameter to be frozen meanwhile"
            )
        if self._grad is None:
            if places is None:
                raise RuntimeError(
                    ".grad: expected it to be read before step() or zero_grad(), but got the "
                    "gradient of a step that is over and was never written"
                )
            if places.is_cast(self):
                return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)
            places.write()
        assert self._grad is not None
        return self._grad

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return None: the copy of a parameter belongs to no step of this optimizer."""


class _Place:
    """A parameter, its stand-in, and the gradient that has taken its place."""

    def __init__(self, param: Tensor, stand_in: UnwrittenGrad) -> None:
        self.param = param
        self.stand_in = stand_in
        self._versions = self._now()

    def _now(self) -> tuple[int, int]:
        # Operations on the stand-in and its views change the gradient, but count there.
        written = self.stand_in._grad
        return self.stand_in._version, 0 if written is None else written._version

    def take(self, written: Tensor | None) -> None:
        """Let a gradient take the place of the stand-in."""
        self.stand_in._grad = written
        self._versions = self._now()

    def is_unchanged(self) -> bool:
        """Return whether nobody but this module has changed ``.grad``."""
        now, written = self.param.grad, self.stand_in._grad
        same = now is self.stand_in or (now is written and written is not None)
        return same and self._now() == self._versions


class UnwrittenGrads:
    """The stand-ins of one step. When it is released, they are taken out of ``.grad``.

    Args:
        owner: the optimizer, which writes the gradients of the step to ``.grad``.
    """

    def __init__(self, owner: weakref.ref[Any]) -> None:
        self._owner = owner
        self._places: dict[int, _Place] = {}
        self._has_cast = False
        self.clear = weakref.finalize(self, _take_out, self._places)
        self.clear.atexit = False

    def excuse(self) -> None:
        """Record that an error has been raised."""
        owner = self._owner()
        if owner is not None:
            owner._pending.excuse()

    def is_cast(self, stand_in: UnwrittenGrad) -> bool:
        """Return whether the parameter of a stand-in has been cast or moved, and remember it.

        ``Module.to`` casts ``.grad`` after its parameter. It must not stop half-way, so it gets
        zeros, and the step is refused.
        """
        param = self._places[stand_in._key].param
        if param.dtype != stand_in.dtype or param.device != stand_in.device:
            self._has_cast = True
            self.excuse()
            return True
        return False

    def put(self, params: Iterable[Tensor]) -> None:
        """Put stand-ins into ``.grad`` of parameters, where it is None."""
        for param in params:
            if param.grad is None:
                place = self._places.get(id(param))
                if place is None or place.stand_in._grad is not None:
                    place = _Place(param, UnwrittenGrad.of(param, self))
                    self._places[id(param)] = place
                param.grad = place.stand_in

    def holds(self, param: Tensor) -> bool:
        """Return whether ``.grad`` of a parameter comes from here, read or unread."""
        return id(param) in self._places

    def write(self) -> None:
        """Replace the stand-ins by the aggregated gradients, but not what others have put there."""
        before = [(place, place.param.grad) for place in self._places.values()]
        owner = self._owner()
        assert owner is not None  # it owns the step that owns this
        with torch.inference_mode(False), torch.no_grad():
            owner._write_unread()
        for place, grad in before:
            place.take(place.param.grad)
            if grad is not place.stand_in:
                place.param.grad = grad

    def settle(self) -> bool:
        """Return whether the step must use ``.grad``, and write what is missing then.

        It must if any of it has been read: not all changes can be seen.
        """
        places = self._places.values()
        read = any(place.stand_in._grad is not None for place in places)
        if not (self.changed() or (read and self._has_grads())):
            return False
        if any(place.stand_in._grad is None for place in places):
            self.write()
        for place in places:  # `param.grad /= 2` puts the stand-in there again
            if place.param.grad is place.stand_in:
                place.param.grad = place.stand_in._grad
        return True

    def changed(self) -> bool:
        """Return whether anybody has changed ``.grad`` since the last environment.

        Raises:
            RuntimeError: the model has been cast or moved, and its gradients are lost.
        """
        if self._has_cast:
            raise RuntimeError(
                "param_groups: expected parameters to stay as they are until the step, but they "
                "have been cast or moved after the first environment; call zero_grad() and start "
                "the step again"
            )
        return self._has_grads() and not all(p.is_unchanged() for p in self._places.values())

    def _has_grads(self) -> bool:
        """Return whether any ``.grad`` is left.

        Where none is, a loop has called ``model.zero_grad()``, which is no wish to lose the
        environments. Where some are None, the loop has excluded these parameters.
        """
        return any(place.param.grad is not None for place in self._places.values())


def _take_out(places: dict[int, _Place]) -> None:
    for place in places.values():
        if place.param.grad is place.stand_in:
            place.param.grad = None
