"""What the integrations have to equal: the loop over environments, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from andmask_ext import reference

TAU = 0.5
# Votes are integers, and models compute in float64: rounding can move an update only so far.
CLOSE = {"rtol": 1e-7, "atol": 1e-10}


def needs(*packages: str) -> None:
    """Skip a module's tests where a framework is missing; continuous integration has all."""
    for package in packages:
        pytest.importorskip(package, reason="optional: pip install andmask_ext[trainers]")


def aggregate(model: nn.Module, losses: Iterable[Tensor], tau: float = TAU) -> None:
    """Write the AND-masked mean of the gradients of losses to ``.grad``, by the specification."""
    params = [param for param in model.parameters() if param.requires_grad]
    grads = [torch.autograd.grad(loss, params, allow_unused=True) for loss in losses]
    for param, column in zip(params, zip(*grads, strict=True), strict=True):
        if all(grad is None for grad in column):
            continue  # the optimizer leaves it alone
        stack = torch.stack([torch.zeros_like(param) if g is None else g for g in column])
        param.grad = reference.masked_mean(stack, tau).to(param.dtype)


def train_by_loop(
    model: nn.Module,
    steps: Sequence[Iterable[Callable[[], Tensor]]],
    optimizer: torch.optim.Optimizer,
    max_norm: float | None = None,
    scheduler: Any = None,
    tau: float = TAU,
) -> list[float]:
    """Train as the paper says. Return the norm of each gradient, before clipping.

    Args:
        model: the model.
        steps: for each step, functions that return the loss of an environment.
        optimizer: one of torch.
        max_norm: clips the gradient, if it is given.
        scheduler: steps after each step.
        tau: the threshold.
    """
    norms = []
    for environments in steps:
        aggregate(model, (loss() for loss in environments), tau)
        limit = float("inf") if max_norm is None else max_norm
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return norms


def assert_same(model: nn.Module, other: nn.Module, **tolerance: float) -> None:
    """Raise unless two models have the same parameters and buffers up to rounding."""
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], **{**CLOSE, **tolerance}, msg=name)


def assert_same_bits(model: nn.Module, other: nn.Module) -> None:
    """Raise unless two models are equal to the bit."""
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def members(environments: str, sites: Tensor) -> list[Tensor]:
    """Return the examples of each environment of a batch: "each", "2" groups, or by "site"."""
    size = len(sites)
    if environments == "site":
        return [(sites == site).nonzero()[:, 0] for site in sites.unique()]
    return list(torch.arange(size).chunk(size if environments == "each" else int(environments)))
