"""Problems whose scores are known, and oracles that share no code with the package."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from hypothesis import strategies as st
from torch import Tensor

Loss = Callable[[Tensor], Tensor]


def random_spd(rng: np.random.Generator, n: int, condition: float = 100.0) -> np.ndarray:
    """A matrix with random axes and eigenvalues between 1 and 1 / condition, both drawn."""
    basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
    values = np.exp(rng.uniform(-np.log(condition), 0, n))
    out = (basis * values) @ basis.T
    return (out + out.T) / 2


def quadratic_losses(
    hessians: np.ndarray | list[np.ndarray], dtype: torch.dtype = torch.float64
) -> list[Loss]:
    """Losses x' H x / 2: a shared minimum of 0 at 0."""

    def loss(hessian: np.ndarray) -> Loss:
        matrix = torch.tensor(hessian, dtype=dtype)
        return lambda x: x @ matrix @ x / 2

    return [loss(hessian) for hessian in hessians]


def largest_ratio(hessians: np.ndarray | list[np.ndarray]) -> float:
    """The largest generalised eigenvalue of all ordered pairs, by scipy."""
    return max(
        float(scipy.linalg.eigh(other, one, eigvals_only=True)[-1])
        for e, one in enumerate(hessians)
        for f, other in enumerate(hessians)
        if e != f
    )


def point(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(n, dtype=dtype)


@st.composite
def spd_sets(
    draw: st.DrawFn, environments: st.SearchStrategy[int] | None = None, commuting: bool = False
) -> np.ndarray:
    """Hessians [d, n, n], positive definite, d = 2 unless drawn; diagonal if ``commuting``."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    d, n = 2 if environments is None else draw(environments), draw(st.integers(1, 6))
    condition = draw(st.sampled_from([1.0, 2.0, 30.0, 1e3]))
    scale = draw(st.sampled_from([1e-3, 1.0, 50.0]))
    if commuting:
        values = scale * np.exp(rng.uniform(-np.log(condition), 0, (d, n)))
        return np.stack([np.diag(v) for v in values])
    return scale * np.stack([random_spd(rng, n, condition) for _ in range(d)])


def patchwork(points: int = 501) -> tuple[list[Loss], Tensor]:
    """The paper's network of two sigmoids that fits each environment with a unit of its own."""

    def network(theta: Tensor, x: Tensor) -> Tensor:
        one = theta[4] * torch.sigmoid(theta[0] * x + theta[1])
        return one + theta[5] * torch.sigmoid(theta[2] * x + theta[3])

    def target(x: Tensor) -> Tensor:
        return (10 * (x - 0.4)).clamp(0, 1) + (10 * (x - 0.7)).clamp(0, 1)

    def loss(low: float, high: float) -> Loss:
        x = torch.linspace(low, high, points, dtype=torch.float64)
        return lambda theta: (network(theta, x) - target(x)).square().mean()

    theta = torch.tensor([100.0, -45.0, 100.0, -75.0, 1.0, 1.0], dtype=torch.float64)
    return [loss(0.0, 0.5), loss(0.5, 1.0)], theta


def tilted(loss: Loss, slope: np.ndarray, gap: float = 0.0) -> Loss:
    """The loss plus a linear function."""
    tilt = torch.tensor(slope)
    return lambda x: loss(x) + tilt @ x + gap


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)
