"""What rules have in common."""

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
    """How the gradients of several environments become one update.

    Rules are immutable values: compare them, hash them, pickle them, share them between threads. A
    checkpoint that holds one loads with ``torch.load(weights_only=True)``.

    To write a rule of your own, derive from this class and give it ``__call__``; everything in
    this package that takes a rule takes it, and hands it the gradients of all environments. (A
    plain function from ``[d, *shape]`` to ``[*shape]`` will do for :func:`andmask_ext.backward`.)

    Arguments are checked when a rule is made, gradients when it is called.

    Attributes:
        name: of the rule in the native library.
        moments: what the rule needs beside the sum of the gradients: a subset of ``"votes"``,
            ``"squares"``, ``"logs"`` (see :class:`andmask_ext.Moments`). None: it needs the
            gradients of all environments at once, and cannot be streamed.
        rescale: whether the update of a parameter is divided by the mean of its mask.

    Raises:
        TypeError: an argument of the rule has another type than its description says.
        ValueError: it lies outside of the range that is stated there.

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
        """What the native rule takes, in its order."""
        return []

    def __call__(self, grads: Tensor) -> Tensor:
        """Aggregate stacked gradients.

        Args:
            grads: ``[d, *shape]``, dim 0 is the environment; float16, bfloat16, float32 or
                float64, any strides.

        Returns:
            The update ``[*shape]``, dtype of ``grads``, contiguous. It is not differentiable: a
            backward pass through it raises NotImplementedError (:class:`AndMask` is the exception).

        Raises:
            TypeError: ``grads`` is not a dense floating-point tensor.
            ValueError: ``grads`` has no environment, or too few for the rule.
        """
        check_grads(grads)
        self._check_environments(grads.shape[0])
        refuse_derivative(grads, self)
        update: Tensor = torch.ops.andmask._aggregate.default(
            grads, self.name, self.arguments, self.rescale, self._noise(grads)
        )
        return update

    def update(self, moments: Moments) -> list[Tensor | None]:
        """Return the update of each parameter, None for those that no environment touched.

        The moments stay as they are: several rules, or values of ``tau``, may be tried on them.

        Args:
            moments: they keep every kind that ``self.moments`` names.

        Returns:
            One tensor per parameter, in its shape, dtype, device and layout.

        Raises:
            TypeError: the rule needs the gradients of all environments at once.
            ValueError: no environment has been added, or the rule needs a moment that is not kept.
        """
        return self._apply(moments, torch.ops.andmask._resolve.default)

    def _update_in_place(self, moments: Moments) -> list[Tensor | None]:
        """Return what :meth:`update` returns, in the memory of the sums; the moments start anew."""

        def resolve(*arguments: Any) -> list[Tensor]:
            torch.ops.andmask._resolve_.default(*arguments)
            sums: list[Tensor] = arguments[0]
            return sums

        updates = self._apply(moments, resolve)
        moments._release_sums()
        return updates

    def _apply(self, moments: Moments, op: Callable[..., list[Tensor]]) -> list[Tensor | None]:
        touched, params = moments._touched, moments._params
        self._native_arguments(moments, touched)  # raises, even if there is nothing to do
        updates: list[Tensor | None] = [None] * len(params)
        for places in by_device([params[index] for index in touched]):
            indices = [touched[place] for place in places]
            with torch.no_grad():
                resolved = op(*self._native_arguments(moments, indices))
            for index, update in zip(indices, resolved, strict=True):
                updates[index] = update.to(params[index].dtype)
        return updates

    def _native_arguments(self, moments: Moments, indices: Sequence[int]) -> tuple[Any, ...]:
        """Return what the native consumers take: moments of some parameters, count and rule."""
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
        return (*moments._lists(indices), moments.count, self.name, self.arguments, self.rescale)

    def _check_environments(self, environments: int) -> None:
        """Raise ValueError if there are too few of them."""

    def _noise(self, grads: Tensor) -> Tensor | None:
        """Draw what the rule needs of random numbers, from torch's global generator."""
        return None
