"""What the tests of the optimizers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import andmask_ext as am

optim = am.optim

# Every optimizer that takes environments, on parameters (or groups of them).
MAKERS: dict[str, Callable[..., Any]] = {
    "sgd": lambda params, **kw: optim.AndMaskSGD(params, lr=0.1, momentum=0.9, **unanimous(kw)),
    "adam": lambda params, **kw: optim.AndMaskAdam(params, lr=0.1, amsgrad=True, **unanimous(kw)),
    "adamw": lambda params, **kw: optim.AndMaskAdamW(params, lr=0.1, **unanimous(kw)),
    "wrapper": lambda params, **kw: optim.EnvironmentWrapper(
        torch.optim.RMSprop(params, lr=0.1), **unanimous(kw)
    ),
}


def unanimous(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with ``tau=1``, unless they say something else of the rule."""
    return options if {"tau", "rule"} & options.keys() else {"tau": 1.0, **options}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in [(3, 4), (), (7,)]]


def random_grads(params: Sequence[Tensor], environments: int = 3) -> list[Tensor]:
    return [torch.randn(environments, *p.shape).to(p.dtype) for p in params]


def backward(params: Sequence[Tensor], grads: Sequence[Tensor | None], factor: float = 1.0) -> None:
    """A backward pass that gives exactly these gradients (times a factor)."""
    total: Any = 0.0
    for param, grad in zip(params, grads, strict=True):
        if grad is not None:
            total = total + (param * grad).sum()
    (total * factor).backward()


def environments(
    optimizer: Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor], **options: Any
) -> None:
    """One environment for each row of the stacked gradients."""
    for row in range(len(grads[0])):
        with optimizer.environment(**options):
            backward(params, [stack[row] for stack in grads])


def values(params: Sequence[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def assert_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """The same bits."""
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.detach(), b.detach())


def batches(environments: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 4), torch.randn(8, 3)) for _ in range(environments)]


def losses(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [nn.functional.mse_loss(model(x), y) for x, y in data]


def train_step(optimizer: Optimizer, model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in data:
        with optimizer.environment():
            nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
