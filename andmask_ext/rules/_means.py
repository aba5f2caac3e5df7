"""The mean, and robust means that a few outlying environments cannot move far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_count, check_grads, check_number
from ._base import Rule


@dataclass(frozen=True)
class Mean(Rule):
    r"""The plain mean over environments :math:`\bar g`, as in training on the pooled data.

    Example:
        >>> import torch, andmask_ext
        >>> andmask_ext.rules.Mean()(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        tensor([2., 1.])
    """

    name = "mean"
    moments = ()


@dataclass(frozen=True)
class Median(Rule):
    """The median of each coordinate. For even d it is the mean of the two middle values.

    Example:
        >>> import torch, andmask_ext
        >>> andmask_ext.rules.Median()(torch.tensor([[1.0, 5.0], [2.0, -6.0], [300.0, 7.0]]))
        tensor([2., 5.])

    Reference:
        Median-based stochastic gradient descent, arXiv 2003.07422.
    """

    name = "median"


@dataclass(frozen=True)
class MedianOfThree(Rule):
    """The median of the means of the first, second and last third of the environments.

    If 3 does not divide the number of environments, the first groups have one more. The rule is
    fast and less noisy than :class:`Median`. One outlying environment affects only one group.

    Raises:
        ValueError: when called with fewer than three environments.

    Example:
        >>> import torch, andmask_ext
        >>> grads = torch.tensor([1.0, 3.0, 3.0, 5.0, 900.0])  # groups: 1, 3 and 3, 5 and 900
        >>> andmask_ext.rules.MedianOfThree()(grads)
        tensor(4.)

    Reference:
        M3 in arXiv 2003.07422.
    """

    name = "median"  # of the means

    def __call__(self, grads: Tensor) -> Tensor:
        """Aggregate stacked gradients; see :meth:`Rule.__call__`."""
        check_grads(grads)
        if grads.shape[0] < 3:
            raise ValueError(
                f"grads: MedianOfThree expected at least 3 environments, but got {grads.shape[0]}"
            )
        mean = Mean()
        # Rounding the means to 16 bits keeps their order, so it does not change the median.
        return super().__call__(torch.stack([mean(part) for part in grads.tensor_split(3)]))


@dataclass(frozen=True)
class TrimmedMean(Rule):
    """Drop the b largest and the b smallest gradients of each coordinate, and average the rest.

    Args:
        b: number of gradients to drop at each end, an int >= 0. 0 is the plain mean.

    Raises:
        ValueError: when called with ``2 * b`` or fewer environments.

    Example:
        >>> import torch, andmask_ext
        >>> rule = andmask_ext.rules.TrimmedMean(b=1)
        >>> rule(torch.tensor([[1.0, 5.0], [2.0, -6.0], [300.0, 7.0], [4.0, 6.0]]))
        tensor([3.0000, 5.5000])

    Reference:
        Yin et al., *Byzantine-robust distributed learning: towards optimal statistical rates*, ICML
        2018.
    """

    b: int = 1

    name = "trimmed_mean"

    def __post_init__(self) -> None:
        check_count("b", self.b, 0)

    @property
    def arguments(self) -> list[float]:
        return [float(self.b)]

    def _check_environments(self, environments: int) -> None:
        if environments <= 2 * self.b:
            raise ValueError(
                f"grads: TrimmedMean(b={self.b}) expected more than {2 * self.b} environments, "
                f"but got {environments}"
            )


@dataclass(frozen=True)
class WinsorizedMean(Rule):
    """Clip each coordinate to its percentiles c and 100 - c over environments, then average.

    Percentiles are interpolated linearly, as in ``numpy.percentile``.

    Args:
        c: per cent, in [0, 50]. 0 is the plain mean, 50 the median.

    Example:
        >>> import torch, andmask_ext
        >>> rule = andmask_ext.rules.WinsorizedMean(c=25.0)
        >>> rule(torch.tensor([1.0, 2.0, 3.0, 4.0, 900.0]))  # as of 2, 2, 3, 4, 4
        tensor(3.)

    Reference:
        arXiv 2002.10657.
    """

    c: float = 10.0

    name = "winsorized_mean"

    def __post_init__(self) -> None:
        check_number("c", self.c, "a number in [0, 50]", lambda c: 0 <= c <= 50)
        object.__setattr__(self, "c", float(self.c))

    @property
    def arguments(self) -> list[float]:
        return [self.c]
