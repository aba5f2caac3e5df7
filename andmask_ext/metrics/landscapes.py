"""Losses of two parameters in two environments, to look at and to test rules on.

Each loss takes a tensor [2] and returns a 0-dim one, on any device and dtype, and can be
differentiated and mapped over by ``torch.func``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Landscape", "quadratics", "two_minima"]

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Landscape:
    """Losses of environments, and what is known about them.

    Attributes:
        losses: one for each environment.
        points: places worth marking, by name.
        bounds: a rectangle that shows all of it: lowest and highest first parameter, then second.
    """

    losses: tuple[Loss, ...]
    points: dict[str, tuple[float, float]] = field(default_factory=dict)
    bounds: tuple[float, float, float, float] = (-3.0, 3.0, -3.0, 3.0)


def quadratics(
    hessians: Tensor | Sequence[Sequence[Sequence[float]]], center: tuple[float, float] = (0.0, 0.0)
) -> Landscape:
    r"""Return quadratic losses with a common minimum.

    .. math:: L_e(\theta) = \tfrac12 (\theta - c)^\top H_e (\theta - c)

    Args:
        hessians: one symmetric matrix for each environment.
        center: the minimum, with loss 0.

    Raises:
        ValueError: ``hessians`` do not have shape [environments, 2, 2], or are not symmetric.

    Shape:
        - hessians: :math:`(d, 2, 2)`

    Example:
        >>> import torch
        >>> from andmask_ext.metrics import landscapes
        >>> first, second = landscapes.quadratics([[[4, 0], [0, 1]], [[1, 0], [0, 4]]]).losses
        >>> first(torch.tensor([1.0, 0.0])), second(torch.tensor([1.0, 0.0]))
        (tensor(2.), tensor(0.5000))

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.2.
    """
    matrices = torch.as_tensor(hessians, dtype=torch.float64, device="cpu")
    if matrices.dim() != 3 or matrices.shape[1:] != (2, 2) or not len(matrices):
        raise ValueError(f"hessians: expected shape [d >= 1, 2, 2], but got {list(matrices.shape)}")
    if not torch.allclose(matrices, matrices.mT):
        raise ValueError("hessians: expected symmetric matrices")

    def loss_of(matrix: list[list[float]]) -> Loss:
        (xx, xy), (_, yy) = matrix

        def loss(theta: Tensor) -> Tensor:
            x, y = theta[0] - center[0], theta[1] - center[1]
            return (xx * x * x + 2 * xy * x * y + yy * y * y) / 2

        return loss

    losses = tuple(loss_of(matrix) for matrix in matrices.tolist())
    # A step along the flattest direction to a loss of 1, and somewhat more, is in the picture.
    flattest = float(torch.linalg.eigvalsh(matrices).clamp(min=1e-3).min())
    reach = 1.2 * math.sqrt(2 / flattest)
    x, y = center
    return Landscape(
        losses, {"minimum": center}, (x - reach, x + reach, y - reach, y + reach)
    )  # fmt: skip


def two_minima(floor: float = 0.05, slope: float = 0.02, steepness: float = 2.0) -> Landscape:
    r"""Return two losses whose mean has two global minima, of which they share one.

    At the *consistent* minimum both environments have the same round bowl. At the *patchwork*
    minimum each has a valley, across the other's, whose bottom falls off a little towards both
    ends: alone it has a pass there, and no minimum. Only their mean has one, and it looks exactly
    like the other: the same loss, the same curvature. Around it the two gradients have opposite
    signs in both coordinates.

    Args:
        floor: loss at both minima, the same in both environments.
        slope: how much lower than the pass the valley's ends are; less than ``floor``, so that
            losses stay positive.
        steepness: second derivative across a valley.

    Raises:
        ValueError: ``0 < slope < floor`` does not hold, or ``steepness`` is too small for the mean
            to have a minimum at the crossing of the valleys.

    Example:
        >>> import torch
        >>> from andmask_ext.metrics import landscapes
        >>> landscape = landscapes.two_minima()
        >>> for point in landscape.points.values():
        ...     print([round(loss(torch.tensor(point)).item(), 3) for loss in landscape.losses])
        [0.05, 0.05]
        [0.05, 0.05]

    Reference:
        In the spirit of figure 1 of Parascandolo et al., *Learning explanations that are hard to
        vary*, ICLR 2021; the formula is ours.
    """
    if not 0 < slope < floor:
        raise ValueError(f"slope: expected 0 < slope < floor = {floor}, but got {slope}")
    half, blend = 0.9, 0.15  # length of a valley to either side; width of ridges between basins
    bowl = (steepness - 4 * slope / half**2) / 2  # the mean's curvature at the crossing
    if not bowl > 0:
        raise ValueError(
            f"steepness: expected more than {4 * slope / half**2:.3g}, but got {steepness}"
        )
    consistent, patchwork = (-1.3, 1.3), (1.3, -1.3)

    def loss_of(across: int) -> Loss:
        def loss(theta: Tensor) -> Tensor:
            x, y = theta[0] - consistent[0], theta[1] - consistent[1]
            shared = floor + bowl / 2 * (x * x + y * y)
            side = theta[across] - patchwork[across]
            along = (theta[1 - across] - patchwork[1 - across]) / half
            inside = slope * ((along * along - 1) ** 2 - 1)
            bottom = torch.where(along.abs() < 1, inside, (along.abs() - 1) ** 2 - slope)
            valley = floor + steepness / 2 * side * side + bottom
            return -blend * torch.logaddexp(-shared / blend, -valley / blend)

        return loss

    return Landscape((loss_of(0), loss_of(1)), {"consistent": consistent, "patchwork": patchwork})
