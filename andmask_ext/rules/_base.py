"""Base class of rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._autograd import refuse_derivative
from .._checks import check_grads
from .._devices import by_device
from ..moments import Moments


class Rule:
    """Base class: a rule aggregates the gradients of several environments to one update.

    Rules are immutable values. They can be compared, hashed, pickled and shared between threads. A
    checkpoint with rules loads with ``torch.load(weights_only=True)``.

    To write a rule, derive from this class and define ``__call__``. Such a rule needs the gradients
    of all environments at once, so :func:`andmask_ext.backward` takes it, and optimizers do not.
    (:func:`andmask_ext.backward` also takes a function from ``[d, *shape]`` to ``[*shape]``.)

    The constructor checks the arguments of a rule. A call checks the gradients.

    Attributes:
        name: the name of the rule in the native library.
        moments: the moments that the rule needs in addition to the sum: a subset of ``"votes"``,
            ``"squares"``, ``"logs"`` and ``"voters"`` (see :class:`andmask_ext.Moments`). None: it
            needs the gradients of all environments at once.
        rescale: whether the update of a parameter is divided by the mean of its mask.

    Raises:
        TypeError: an argument of the rule has the wrong type.
        ValueError: an argument of the rule lies outside its range.

    Shape:
        - grads: :math:`(d, *)`, stacked gradients
        - output: :math:`(*)`

    Example:
        >>> import torch, andmask_ext as am
        >>> class SignOfMean(am.rules.Rule):
        ...     def __call__(self, grads):
        ...         return grads.mean(0).sign()
        >>> weight = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> losses = [(weight * x).sum() for x in torch.tensor([[1.0, -2.0], [3.0, -4.0]])]
        >>> am.backward(losses, SignOfMean())
        >>> weight.grad
        tensor([ 1., -1.])
    """

    name: ClassVar[str]
    moments: ClassVar[tuple[str, ...] | None] = None
    rescale: bool = False

    @property
    def arguments(self) -> list[float]:
        """The arguments of the native rule, in its order."""
        return []

    def __call__(self, grads: Tensor) -> Tensor:
        """Aggregate stacked gradients.

        Dimension 0 is that of the environments: a vector holds d gradients of one element.

        Args:
            grads: ``[d, *shape]`` for d environments: float16, bfloat16, float32 or float64, any
                strides.

        Returns:
            The update ``[*shape]``, contiguous, in the dtype of ``grads``. Only that of
            :class:`AndMask` is differentiable. A backward pass through others raises
            NotImplementedError.

        Raises:
            TypeError: ``grads`` is not a dense floating-point tensor.
            ValueError: ``grads`` has no environment, or too few for the rule.
        """
        check_grads(grads)
        self._check_environments(grads.shape[0])
        self._warn_of(grads.shape[0])
        refuse_derivative(grads, self)
        update: Tensor = torch.ops.andmask._aggregate.default(
            grads, self.name, self.arguments, self.rescale, self._noise(grads)
        )
        return update

    def update(self, moments: Moments) -> list[Tensor | None]:
        """Return the update of each parameter.

        The moments do not change, so several rules or values of ``tau`` can be tried on them.

        Args:
            moments: moments with all kinds of ``self.moments``.

        Returns:
            One tensor per parameter, in its shape, dtype, device and layout. None for a parameter
            that no environment has a gradient for.

        Raises:
            TypeError: the rule needs the gradients of all environments at once.
            ValueError: there is no environment, or the moments lack a kind that the rule needs.
        """
        self._warn_of(moments.count)
        return self._apply(moments, torch.ops.andmask._resolve.default)

    def _update_in_place(self, moments: Moments) -> list[Tensor | None]:
        """Return the result of :meth:`update` in the memory of the sums. Reset the moments."""

        def resolve(*arguments: Any) -> list[Tensor]:
            torch.ops.andmask._resolve_.default(*arguments)
            sums: list[Tensor] = arguments[0]
            return sums

        updates = self._apply(moments, resolve)
        moments._release_sums()
        return updates

    def _apply(self, moments: Moments, op: Callable[..., list[Tensor]]) -> list[Tensor | None]:
        touched, params = moments._touched, moments._params
        self._native_arguments(moments, touched)  # checks, even if no parameter was touched
        updates: list[Tensor | None] = [None] * len(params)
        for places in by_device([params[index] for index in touched]):
            indices = [touched[place] for place in places]
            with torch.no_grad():
                resolved = op(*self._native_arguments(moments, indices))
            for index, update in zip(indices, resolved, strict=True):
                updates[index] = update.to(params[index].dtype)
        return updates

    def _native_arguments(self, moments: Moments, indices: Sequence[int]) -> tuple[Any, ...]:
        """Return the arguments of native ops: moments of some parameters, count and rule."""
        if self.moments is None:
            raise TypeError(
                f"{self} needs the gradients of all environments at once: use rule(grads)"
            )
        if moments.count == 0:
            raise ValueError("moments: expected at least one environment, but got 0")
        if not set(self.moments) <= set(moments.kinds):
            raise ValueError(
                f"moments: expected {' + '.join(('sum', *self.moments))} for {self}, "
                f"but got {' + '.join(moments._memory.kinds)}; "
                f"make them with Moments(params, rule.moments)"
            )
        self._check_environments(moments.count)
        return (*moments._lists(indices), moments.count, self.name, self.arguments, self.rescale)

    def _check_environments(self, environments: int) -> None:
        """Raise ValueError if there are too few environments for the rule."""

    def _warn_of(self, environments: int, owner: object = None) -> None:
        """Warn ``owner``, or once in a process, if the rule can do nothing with so many."""

    def _noise(self, grads: Tensor) -> Tensor | None:
        """Draw the random numbers of the rule from torch's global generator; None: it has none."""
        return None
