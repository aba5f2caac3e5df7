"""Arithmetic and geometric means of Hessians."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from andmask_ext.metrics.consistency import hessian_means

from .common import random_spd, spd_sets

several = st.integers(3, 5)


def geometric(matrices: np.ndarray) -> np.ndarray:
    found = hessian_means(torch.tensor(matrices)).geometric
    assert isinstance(found, Tensor)
    return found.cpu().numpy()


def close(one: np.ndarray, other: np.ndarray) -> None:
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-8 * np.abs(other).max())


@given(matrices=spd_sets())
def test_two_matrices_by_square_roots(matrices: np.ndarray) -> None:
    one, other = matrices
    root = scipy.linalg.sqrtm(one).real
    inverse = np.linalg.inv(root)
    expected = root @ scipy.linalg.sqrtm(inverse @ other @ inverse).real @ root
    close(geometric(matrices), expected)


@given(matrices=spd_sets(environments=several))
def test_mean_logarithm_is_zero(matrices: np.ndarray) -> None:
    """What defines the Karcher mean."""
    inverse = np.linalg.inv(scipy.linalg.sqrtm(geometric(matrices)).real)
    values, vectors = np.linalg.eigh(inverse @ matrices @ inverse)
    logs = (vectors * np.log(values)[:, None]) @ vectors.transpose(0, 2, 1)
    assert np.abs(logs.mean(0)).max() <= 1e-8


@given(matrices=spd_sets(environments=st.integers(2, 5), commuting=True))
def test_commuting(matrices: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal(matrices.shape[1:]))
    diagonals = matrices.diagonal(axis1=1, axis2=2)
    expected = (basis * np.exp(np.log(diagonals).mean(0))) @ basis.T
    close(geometric(basis @ matrices @ basis.T), expected)


@given(matrices=spd_sets(environments=st.integers(2, 4)), seed=st.integers(0, 99))
def test_congruence(matrices: np.ndarray, seed: int) -> None:
    n = matrices.shape[-1]
    change = np.random.default_rng(seed).standard_normal((n, n)) + 3 * np.eye(n)
    moved = change @ matrices @ change.T
    close(
        geometric((moved + moved.transpose(0, 2, 1)) / 2), change @ geometric(matrices) @ change.T
    )


@given(matrices=spd_sets(environments=st.integers(2, 5)), order=st.randoms(use_true_random=False))
def test_order_scale_inverse(matrices: np.ndarray, order: object) -> None:
    mean = geometric(matrices)
    shuffled = list(range(len(matrices)))
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    close(geometric(matrices[shuffled]), mean)
    scales = np.arange(1.0, len(matrices) + 1)
    close(geometric(scales[:, None, None] * matrices), scales.prod() ** (1 / len(scales)) * mean)
    close(geometric(np.linalg.inv(matrices)), np.linalg.inv(mean))


@given(matrices=spd_sets(environments=st.integers(1, 5)))
def test_between_harmonic_and_arithmetic(matrices: np.ndarray) -> None:
    found = hessian_means(torch.tensor(matrices))
    arithmetic, mean = found.arithmetic.cpu().numpy(), geometric(matrices)
    np.testing.assert_allclose(arithmetic, matrices.mean(0))
    harmonic = np.linalg.inv(np.linalg.inv(matrices).mean(0))
    slack = -1e-9 * np.abs(arithmetic).max()
    assert np.linalg.eigvalsh(arithmetic - mean).min() >= slack
    assert np.linalg.eigvalsh(mean - harmonic).min() >= slack
    logs = [np.linalg.slogdet(m)[1] for m in (arithmetic, mean)]
    assert float(found.log_det_ratio) == pytest.approx(logs[0] - logs[1], abs=1e-8)
    assert float(found.log_det_ratio) >= -1e-10


def test_far_spread_matrices_converge() -> None:
    rng = np.random.default_rng(0)
    matrices = np.stack([random_spd(rng, 8, 1e6) * 10.0**k for k in (-3, 0, 0, 3)])
    mean = geometric(matrices)
    logs = np.linalg.slogdet(matrices)[1]
    assert np.linalg.slogdet(mean)[1] == pytest.approx(logs.mean(), rel=1e-7)


def test_no_convergence_is_an_error() -> None:
    rng = np.random.default_rng(0)
    matrices = torch.tensor(np.stack([random_spd(rng, 4, 1e3) for _ in range(3)]))
    with pytest.raises(RuntimeError, match="did not converge in 1 iterations"):
        hessian_means(matrices, max_iterations=1)


# ---- diagonals ----


@given(matrices=spd_sets(environments=st.integers(1, 5), commuting=True))
def test_diagonals_are_the_commuting_case(matrices: np.ndarray) -> None:
    rows = matrices.diagonal(axis1=1, axis2=2).copy()
    full, short = hessian_means(torch.tensor(matrices)), hessian_means(torch.tensor(rows))
    for name in ("arithmetic", "geometric"):
        torch.testing.assert_close(getattr(full, name).diagonal(), getattr(short, name))
    torch.testing.assert_close(full.log_det_ratio, short.log_det_ratio, atol=1e-9, rtol=1e-9)


def test_diagonals_in_the_structure_of_parameters() -> None:
    rows = [
        {"weight": torch.tensor([[1.0, 4.0]]), "bias": torch.tensor(2.0)},
        {"weight": torch.tensor([[9.0, 4.0]]), "bias": torch.tensor(8.0)},
    ]
    found = hessian_means(rows)
    assert isinstance(found.geometric, dict)
    torch.testing.assert_close(found.geometric["weight"], torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(found.geometric["bias"], torch.tensor(4.0))
    assert isinstance(found.arithmetic, dict)
    torch.testing.assert_close(found.arithmetic["weight"], torch.tensor([[5.0, 4.0]]))
    assert float(found.log_det_ratio) == pytest.approx(np.log(5 / 3) + np.log(5 / 4))
    diagonal = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # of 2 x 2 weights
    listed = hessian_means([diagonal, diagonal])
    torch.testing.assert_close(listed.geometric, diagonal)


def test_zeros_in_diagonals() -> None:
    found = hessian_means(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    assert isinstance(found.geometric, Tensor)
    assert found.geometric.tolist() == [0.0, 1.0]
    assert float(found.log_det_ratio) == np.inf
    dead = hessian_means(torch.tensor([[0.0, 1.0], [0.0, 4.0]]))
    assert float(dead.log_det_ratio) == pytest.approx(np.log(2.5 / 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype(dtype: torch.dtype) -> None:
    found = hessian_means(torch.stack([torch.eye(2), 4 * torch.eye(2)]).to(dtype))
    assert isinstance(found.geometric, Tensor)
    assert found.geometric.dtype == dtype
    torch.testing.assert_close(found.geometric, 2 * torch.eye(2).to(dtype))
    assert found.log_det_ratio.dtype == torch.float64


# ---- errors ----


@pytest.mark.parametrize(
    ("hessians", "kind", "message"),
    [
        ("H", TypeError, r"hessians\[0\]: expected a Tensor or a dict of Tensors, but got str"),
        (3, TypeError, "hessians: expected a Tensor or a sequence of diagonals, but got int"),
        ([], ValueError, "hessians: expected at least 1 diagonal, but got none"),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, "floating-point Tensor, but got int64"),
        (
            [torch.ones(2, dtype=torch.int64)],
            TypeError,
            "floating-point Tensors, but got int",
        ),
        (torch.ones(3), ValueError, r"shape \[d, n, n\] or \[d, n\].*but got \[3\]"),
        (torch.ones(2, 3, 4), ValueError, r"but got \[2, 3, 4\]"),
        (torch.ones(0, 3), ValueError, r"but got \[0, 3\]"),
        (torch.tensor([[1.0, 2], [3, -4]]), ValueError, r"hessians\[1\].*-4 at coordinate 1"),
        (torch.tensor([[1.0, torch.nan]]), ValueError, r"hessians\[0\].*nan at coordinate 1"),
        ([torch.ones(2), torch.ones(3)], ValueError, r"hessians\[1\]: expected the names and sh"),
        (
            torch.stack([torch.eye(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])]),
            ValueError,
            r"hessians\[1\]: expected a positive definite matrix.*eigenvalue is -1",
        ),
        (
            torch.stack([torch.eye(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])]),
            ValueError,
            r"hessians\[1\]: expected a symmetric matrix.*by 0.5",
        ),
        (
            torch.stack([torch.eye(2), torch.full((2, 2), torch.inf)]),
            ValueError,
            r"hessians\[1\]: expected finite numbers",
        ),
    ],
)
def test_errors(hessians: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        hessian_means(hessians)  # type: ignore[arg-type]


def test_errors_of_options() -> None:
    with pytest.raises(ValueError, match="tol: expected a positive number, but got 0"):
        hessian_means(torch.ones(2, 2), tol=0)
    with pytest.raises(ValueError, match="max_iterations: expected at least 1, but got 0"):
        hessian_means(torch.ones(2, 2), max_iterations=0)


def test_a_list_of_matrices_is_no_list_of_diagonals() -> None:
    matrices = torch.eye(2).expand(3, 2, 2)
    with pytest.raises(ValueError, match="but got a sequence of symmetric matrices"):
        hessian_means(list(matrices))
    assert torch.equal(hessian_means(matrices).arithmetic, torch.eye(2))
