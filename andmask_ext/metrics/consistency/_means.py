"""Arithmetic and geometric means of Hessians: the logical OR and AND of landscapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._checks import check_count, check_number
from ..._dtypes import dtype_name
from ._problem import FlatLayout, Params


@dataclass(frozen=True, eq=False)
class HessianMeans:
    """Means of the environments' Hessians, or of their diagonals.

    Args:
        arithmetic: the Hessian of the pooled loss. It is curved where any environment is curved.
        geometric: the geometric mean. It is curved only where all environments are curved.
        log_det_ratio: log of det arithmetic / det geometric, 0-dim float64. 0 iff all agree.

    Example:
        >>> import torch
        >>> from andmask_ext.metrics import hessian_means
        >>> hessian_means(torch.tensor([[1.0, 8.0], [4.0, 2.0]])).geometric
        tensor([2., 4.])
    """

    arithmetic: Params
    geometric: Params
    log_det_ratio: Tensor


def hessian_means(
    hessians: Tensor | Sequence[Params], *, tol: float = 1e-12, max_iterations: int = 200
) -> HessianMeans:
    r"""Return the arithmetic and the geometric mean of Hessians.

    The geometric (Karcher) mean of positive definite matrices is the matrix G with
    :math:`\sum_e \log(G^{-1/2} H_e G^{-1/2}) = 0`. For two matrices it is
    :math:`A^{1/2} (A^{-1/2} B A^{-1/2})^{1/2} A^{1/2}`; for more it is computed by iteration. For
    diagonals it is :math:`(\prod_e \lambda^e_i)^{1/d}`. All computations are in float64.

    Let :math:`\rho` be det arithmetic / det geometric. Two environments with a shared minimum
    have :math:`\mathcal{I}^\epsilon \le \epsilon (\rho + \sqrt{\rho^2 - 1})^2 \le \epsilon
    (4 \rho^2 - 2)`. The bound :math:`2 \epsilon \rho^2` in the paper does not hold. For
    example, curvatures 1 and 16 in one dimension have score 16 eps and bound 9.03 eps.

    Args:
        hessians: one of three forms: a Tensor ``[d, n, n]`` of symmetric positive definite
            matrices; a Tensor ``[d, n]`` of diagonals; or a sequence of d diagonals in the
            structure of the parameters, each a Tensor or a dict of Tensors. Diagonals may hold
            zeros, whose geometric mean is 0. A coordinate that is zero in all environments does not
            affect the ratio.
        tol: the iteration ends when no entry of the mean logarithm is farther than this from zero.
            If rounding prevents that, up to 1e-6 is accepted.
        max_iterations: the largest number of iterations.

    Returns:
        Both means, in the structure and dtype of one Hessian, and the log of the ratio of
        determinants.

    Raises:
        TypeError: ``hessians`` is neither a floating-point Tensor nor a sequence of diagonals.
        ValueError: the shape is wrong, a matrix is not symmetric positive definite, a diagonal has
            a negative number, or a number is not finite.
        RuntimeError: the iteration did not converge.

    Shape:
        - hessians: :math:`(d, n, n)` or :math:`(d, n)`
        - arithmetic, geometric: :math:`(n, n)` or :math:`(n)`

    Example:
        >>> import torch
        >>> from andmask_ext.metrics import hessian_means
        >>> means = hessian_means(torch.stack([torch.eye(2), torch.diag(torch.tensor([1.0, 4.0]))]))
        >>> means.geometric
        tensor([[1., 0.],
                [0., 2.]])
        >>> round(float(means.log_det_ratio.exp()), 6)
        1.25

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.2;
        Bini and Iannazzo, *Computing the Karcher mean of symmetric positive definite matrices*,
        2013, for the step of the iteration.
    """
    check_number("tol", tol, "a positive number", lambda value: value > 0)
    check_count("max_iterations", max_iterations, 1)
    if not isinstance(hessians, Tensor):
        return _of_diagonals(hessians)
    if not hessians.is_floating_point():
        raise TypeError(
            f"hessians: expected a floating-point Tensor, but got {dtype_name(hessians.dtype)}"
        )
    square = hessians.dim() == 3 and hessians.shape[1] == hessians.shape[2]
    if not (square or hessians.dim() == 2) or 0 in hessians.shape:
        raise ValueError(
            "hessians: expected shape [d, n, n] or [d, n] with d, n >= 1, "
            f"but got {list(hessians.shape)}"
        )
    stacked = hessians.detach().double()
    if not square:
        arithmetic, geometric, ratio = _diagonal_means(stacked)
    else:
        _check_positive(stacked, hessians.dtype)
        stacked = (stacked + stacked.mT) / 2
        arithmetic = stacked.mean(0)
        geometric = _karcher(stacked, tol, max_iterations)
        ratio = _log_det(arithmetic) - _log_det(stacked).mean()
    return HessianMeans(arithmetic.to(hessians.dtype), geometric.to(hessians.dtype), ratio)


def _is_symmetric_matrix(value: object) -> bool:
    if not isinstance(value, Tensor) or value.dim() != 2 or len(value) < 2:
        return False
    return value.shape[0] == value.shape[1] and bool((value == value.mT).all())


def _of_diagonals(hessians: object) -> HessianMeans:
    if not isinstance(hessians, Sequence):
        raise TypeError(
            "hessians: expected a Tensor or a sequence of diagonals, "
            f"but got {type(hessians).__name__}"
        )
    if len(hessians) == 0:
        raise ValueError("hessians: expected at least 1 diagonal, but got none")
    if all(_is_symmetric_matrix(hessian) for hessian in hessians):
        raise ValueError(
            "hessians: expected matrices in one Tensor [d, n, n] (torch.stack them) or a sequence "
            "of diagonals, but got a sequence of symmetric matrices"
        )
    layouts = [FlatLayout(diagonal, f"hessians[{e}]") for e, diagonal in enumerate(hessians)]
    for e, layout in enumerate(layouts):
        if (layout.keys, layout.shapes) != (layouts[0].keys, layouts[0].shapes):
            raise ValueError(
                f"hessians[{e}]: expected the names and shapes of hessians[0], but got others"
            )
    layout = layouts[0]
    rows = torch.stack([layout.flatten(diagonal) for diagonal in hessians])
    if not rows.is_floating_point():
        raise TypeError(
            f"hessians: expected floating-point Tensors, but got {dtype_name(rows.dtype)}"
        )
    arithmetic, geometric, ratio = _diagonal_means(rows.double())
    return HessianMeans(
        layout.unflatten(arithmetic.to(rows.dtype)),
        layout.unflatten(geometric.to(rows.dtype)),
        ratio,
    )


def _diagonal_means(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    bad = ~(rows.isfinite() & (rows >= 0))
    if bool(bad.any()):
        e, place = bad.nonzero()[0].tolist()
        raise ValueError(
            f"hessians[{e}]: expected finite numbers >= 0, but got {float(rows[e, place]):.6g} at "
            f"coordinate {place}"
        )
    arithmetic, geometric = rows.mean(0), rows.log().mean(0).exp()
    ratio = arithmetic.log() - rows.log().mean(0)
    return arithmetic, geometric, torch.where(arithmetic == 0, 0.0, ratio).sum()


def _check_positive(stacked: Tensor, dtype: torch.dtype) -> None:
    size = stacked.abs().amax((1, 2))
    if not bool(size.isfinite().all()):
        e = int((~size.isfinite()).nonzero()[0])
        raise ValueError(f"hessians[{e}]: expected finite numbers, but got infinity or NaN")
    skew = (stacked - stacked.mT).abs().amax((1, 2))
    worst = int((skew / size.clamp(min=1e-300)).argmax())
    if float(skew[worst]) > math.sqrt(torch.finfo(dtype).eps) * float(size[worst]):
        raise ValueError(
            f"hessians[{worst}]: expected a symmetric matrix, "
            f"but it differs from its transpose by {float(skew[worst]):.4g}"
        )
    _, info = torch.linalg.cholesky_ex((stacked + stacked.mT) / 2)
    if bool(info.any()):
        e = int(info.nonzero()[0])
        smallest = float(torch.linalg.eigvalsh((stacked[e] + stacked[e].mT) / 2)[0])
        raise ValueError(
            f"hessians[{e}]: expected a positive definite matrix, "
            f"but its smallest eigenvalue is {smallest:.4g}"
        )


def _log_det(matrices: Tensor) -> Tensor:
    factors: Tensor = torch.linalg.cholesky(matrices)
    return factors.diagonal(dim1=-2, dim2=-1).log().sum(-1).mul(2)


def _within(factor: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of factor^-1 matrices factor^-T."""
    half = torch.linalg.solve_triangular(factor, matrices, upper=False)
    inner = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    return values.clamp(min=torch.finfo(values.dtype).tiny), vectors


def _mean_log(values: Tensor, vectors: Tensor) -> Tensor:
    return torch.matmul(vectors * values.log()[:, None], vectors.mT).mean(0)


def _karcher(matrices: Tensor, tol: float, max_iterations: int) -> Tensor:
    """Return the Karcher mean. It is invariant to congruence, so Cholesky factors are enough."""
    if len(matrices) == 1:
        return matrices[0]
    if len(matrices) == 2:
        factor = torch.linalg.cholesky(matrices[0])
        values, vectors = _within(factor, matrices[1])
        half = factor @ vectors
        return torch.matmul(half * values.sqrt(), half.mT)
    values, vectors = torch.linalg.eigh(matrices)
    values, vectors = torch.linalg.eigh(_mean_log(values, vectors))
    mean = torch.matmul(vectors * values.exp(), vectors.mT)
    damping, before = 1.0, math.inf
    for _ in range(max_iterations):
        factor = torch.linalg.cholesky(mean)
        values, vectors = _within(factor, matrices)
        logs = _mean_log(values, vectors)
        error = float(logs.norm()) / math.sqrt(logs.numel())
        if error <= tol:
            return mean
        if error >= before:
            # The error of logarithms of eigenvalues is rounding times condition number.
            rounding = (
                10 * torch.finfo(values.dtype).eps * float((values[:, -1] / values[:, 0]).max())
            )
            if error <= min(rounding, 1e-6):
                return mean
            damping /= 2
        before = error
        # The step of Bini and Iannazzo: the inverse of the mean of the bounds of x/2 coth(x/2).
        spread = (values[:, -1] / values[:, 0]).log()
        slope = torch.where(spread > 1e-8, spread / 2 / (spread / 2).tanh(), 1.0)
        step = damping * 2 / (1 + float(slope.mean()))
        values, vectors = torch.linalg.eigh(logs)
        half = factor @ vectors
        mean = torch.matmul(half * (step * values).exp(), half.mT)
    raise RuntimeError(
        f"hessians: the geometric mean did not converge in {max_iterations} iterations; its mean "
        f"logarithm is {before:.2g} from zero, and tol is {tol:g}"
    )
