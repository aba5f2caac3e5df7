"""Level sets of quadratic losses, beside those of their arithmetic and geometric means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor

from .. import metrics
from . import palette
from .style import Array, Line, axes_or_new, environment_names, style

__all__ = ["ellipses"]

_MANY = 4  # environments; more look alike, and share an entry of the legend
_LINES = (
    Line(palette.BLUE, "-", ""),
    Line(palette.VERMILION, (0, (6, 2)), ""),
    Line(palette.ORANGE, (0, (1, 1.2)), ""),
    Line(palette.PURPLE, (0, (5, 1.5, 1, 1.5)), ""),
)


def ellipses(
    hessians: Tensor,
    epsilon: float = 1.0,
    *,
    labels: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Draw where quadratic losses are :math:`\epsilon`, and where their means are.

    Outlines are the environments' sets :math:`\tfrac12 \theta^\top H_e \theta = \epsilon`. The
    smaller area has the arithmetic mean of the Hessians: steep where *any* environment is (OR); the
    larger area their geometric mean: steep only where *all* are (AND). The more the environments
    differ, the more the areas do.

    Args:
        hessians: symmetric positive definite matrices, which need not commute.
        epsilon: the loss.
        labels: names of the environments; A, B, ... by default.
        ax: where to draw.

    Returns:
        The axes; the title says how many times as large the arithmetic mean's determinant is.

    Raises:
        TypeError: ``hessians`` is not a tensor.
        ValueError: a matrix is not symmetric and positive definite, ``epsilon`` is not positive, or
            an argument has another length or shape.

    Shape:
        - hessians: :math:`(d, 2, 2)`

    Example:
        >>> import torch
        >>> from andmask_ext import plots
        >>> curvatures = torch.tensor([[4.0, 1.0], [1.0, 4.0]])
        >>> axes = plots.ellipses(torch.diag_embed(curvatures))
        >>> axes.get_title()
        'det(arithmetic) / det(geometric) = 1.56'

    Reference:
        Section 2.2 and figure 3 of Parascandolo et al., *Learning explanations that are hard to
        vary*, ICLR 2021.
    """
    matrices = _checked(hessians)
    names = environment_names(len(matrices), labels)
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon: expected a positive finite number, but got {epsilon}")
    means = metrics.hessian_means(matrices)
    arithmetic, geometric = means.arithmetic, means.geometric
    assert isinstance(arithmetic, Tensor)
    assert isinstance(geometric, Tensor)
    with style():
        axes = axes_or_new(ax, (4.6, 4.9))
        for matrix, face, edge, hatch, name in (
            (geometric, "#BFE3D6", palette.GREEN, None, "geometric mean (AND)"),
            (arithmetic, "#D9D9D9", palette.BLACK, "////", "arithmetic mean (OR)"),
        ):
            axes.fill(
                *_outline(matrix, epsilon),
                facecolor=face,
                edgecolor=edge,
                hatch=hatch,
                hatch_linewidth=0.4,
                linewidth=1.2,
                label=name,
            )
        many = len(matrices) > _MANY
        for number, (matrix, name) in enumerate(zip(matrices, names, strict=True)):
            line = _LINES[0 if many else number]
            label = f"environment {name}"
            if many:
                label = "_" if number else f"{len(matrices)} environments"
            axes.plot(
                *_outline(matrix, epsilon),
                color=line.color,
                linestyle=line.linestyle,
                linewidth=0.8 if many else 1.9,
                alpha=0.5 if many else 1,
                label=label,
            )
        axes.plot(0, 0, "+", color=palette.BLACK, markersize=6, label="_minimum")
        axes.set(xlabel=r"$\theta_1$", ylabel=r"$\theta_2$", aspect="equal")
        ratio = float(torch.linalg.slogdet(arithmetic)[1] - torch.linalg.slogdet(geometric)[1])
        axes.set_title(f"det(arithmetic) / det(geometric) = {_number(ratio)}")
        if ax is None:
            axes.figure.legend(loc="outside lower center", ncols=2)
    return axes


def _checked(hessians: Tensor) -> Tensor:
    if not isinstance(hessians, Tensor):
        raise TypeError(f"hessians: expected a Tensor, but got {type(hessians).__name__}")
    if hessians.dim() != 3 or hessians.shape[1:] != (2, 2) or not len(hessians):
        raise ValueError(f"hessians: expected shape [d >= 1, 2, 2], but got {list(hessians.shape)}")
    matrices = hessians.detach().cpu().double()
    if not matrices.isfinite().all() or not torch.allclose(matrices, matrices.mT):
        raise ValueError("hessians: expected finite symmetric matrices")
    lowest = torch.linalg.eigvalsh(matrices).min(dim=1).values
    if not (lowest > 0).all():
        number = int((lowest <= 0).nonzero()[0])
        raise ValueError(
            "hessians: expected positive definite matrices, whose level sets are bounded, but that "
            f"of environment {number} has eigenvalue {lowest[number]:.3g}"
        )
    return matrices


def _outline(matrix: Tensor, epsilon: float) -> Array:
    r"""Return :math:`\theta = \sqrt{2 \epsilon} L^{-\top} u` over the unit circle, ``[2, n]``."""
    angle = torch.linspace(0, 2 * math.pi, 361, dtype=torch.float64, device="cpu")
    circle = torch.stack((angle.cos(), angle.sin()))
    factor = torch.linalg.cholesky(matrix).mT
    points = torch.linalg.solve_triangular(factor, circle, upper=True) * math.sqrt(2 * epsilon)
    outline: Array = points.numpy()
    return outline


def _number(logarithm: float) -> str:
    if logarithm < math.log(99.5):
        return f"{math.exp(max(logarithm, 0.0)):.3g}"
    exponent = logarithm / math.log(10)
    return f"{math.exp(logarithm):.0f}" if exponent < 6 else f"10^{exponent:.1f}"
