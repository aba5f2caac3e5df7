"""What rules have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .._autograd import refuse_derivative
from .._checks import check_grads

if TYPE_CHECKING:
    from ..moments import Moments


class Rule:
    """How the gradients of several environments become one update.

    Rules are immutable values: compare them, hash them, pickle them, share them between threads. A
    checkpoint that holds one loads with ``torch.load(weights_only=True)``.

    To write a rule of your own, derive from this class and give it ``__call__``; everything in
    this package that takes a rule takes it, and hands it the gradients of all environments. (A
    plain function from ``[d, *shape]`` to ``[*shape]`` will do for :func:`andmask_ext.backward`.)

    Attributes:
        name: of the rule in the native library.
        moments: what the rule needs beside the sum of the gradients: a subset of ``"votes"``,
            ``"squares"``, ``"logs"`` (see :class:`andmask_ext.Moments`). None: it needs the
            gradients of all environments at once, and cannot be streamed.
        rescale: whether the update of a parameter is divided by the mean of its mask.

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

    def resolve(self, moments: Moments) -> list[Tensor | None]:
        """Return the update of each parameter, None for those that no environment touched.

        Raises:
            TypeError: the rule needs the gradients of all environments at once.
            ValueError: no environment has been added, or the rule needs a moment that is not kept.
        """
        if self.moments is None:
            raise TypeError(
                f"{self} needs the gradients of all environments at once: use rule(grads)"
            )
        return moments.resolve(self)

    def _check_environments(self, environments: int) -> None:
        """Raise ValueError if there are too few of them."""

    def _noise(self, grads: Tensor) -> Tensor | None:
        """Draw what the rule needs of random numbers, from torch's global generator."""
        return None
