"""Rules: how the gradients of the environments become one update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from . import ops
from ._checks import check_bool, check_tau
from .moments import Moments

__all__ = ["AndMask", "Mean", "Rule"]


class Rule:
    """How the gradients of the environments become one update."""

    name: ClassVar[str]
    moments: ClassVar[tuple[str, ...] | None] = None
    rescale: bool = False

    @property
    def arguments(self) -> list[float]:
        return []

    def __call__(self, grads: Tensor) -> Tensor:
        raise NotImplementedError

    def resolve(self, moments: Moments) -> list[Tensor | None]:
        if self.moments is None:
            raise TypeError(
                f"{self} needs the gradients of all environments at once: use rule(grads)"
            )
        return moments.resolve(self)


@dataclass(frozen=True)
class Mean(Rule):
    """Mean."""

    name = "mean"
    moments = ()


@dataclass(frozen=True)
class AndMask(Rule):
    """Keep a coordinate of the mean gradient only where the environments agree in sign.

    An immutable value: compare it, hash it, pickle it, share it between threads.

    Args:
        tau: agreement threshold in [0, 1]: a coordinate is kept iff the absolute sum of signs is at
            least ``tau`` times the number of environments. 0 is plain averaging, 1 unanimity.
        rescale: divide each parameter's update by its share of kept coordinates.

    Raises:
        TypeError: ``tau`` is not a number, or ``rescale`` not a bool.
        ValueError: ``tau`` lies outside [0, 1].

    Shape:
        - grads: :math:`(d, *)`, stacked gradients
        - output: :math:`(*)`

    Example:
        >>> import torch, andmask_ext
        >>> rule = andmask_ext.AndMask(tau=1.0)
        >>> rule
        AndMask(tau=1.0, rescale=False)
        >>> rule(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        tensor([2., 0.])

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
    """

    tau: float = 1.0
    rescale: bool = False

    name = "and_mask"
    moments = ("votes",)

    @property
    def arguments(self) -> list[float]:
        return [self.tau]

    def __post_init__(self) -> None:
        check_tau(self.tau)
        check_bool("rescale", self.rescale)
        object.__setattr__(self, "tau", float(self.tau))

    def __call__(self, grads: Tensor) -> Tensor:
        """Aggregate stacked gradients; see :func:`andmask_ext.ops.masked_mean`."""
        return ops.masked_mean(grads, self.tau, self.rescale)
