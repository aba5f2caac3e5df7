"""Weights that a model makes in forward, and terms of the loss that are made of parameters.

The sizes include those of the batch: what is made of parameters has no batch, however long it is.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am

from .exact_loop import RULE, check, loop
from .layers import Function, rand
from .outcomes import refusal

BATCHES = [4, 5, 8, 16]

Make = Callable[[Function], Tensor]


def made(make: Make, *shape: int, **more: Tensor) -> nn.Module:
    """A linear or convolutional layer whose weight is made of ``w``, between two layers."""
    weight = nn.Parameter(0.5 * rand(*shape))
    tensors = {name: nn.Parameter(tensor) for name, tensor in more.items()}
    if len(shape) == 2:
        layer = Function(lambda s, x: F.linear(x, make(s)), w=weight, **tensors)
        return nn.Sequential(layer, nn.Tanh(), nn.Linear(shape[0], 3)).double()
    layer = Function(lambda s, x: F.conv2d(x, make(s), padding=1), w=weight, **tensors)
    return nn.Sequential(
        layer, nn.GroupNorm(4, shape[0]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(shape[0], 3),
    ).double()  # fmt: skip


def seeded(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """A mean loss, in which each environment meets the same draws."""
    torch.manual_seed(3)
    return F.cross_entropy(model(x), labels)


# ---- weights ----

NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch-norm": lambda flat: F.batch_norm(flat[None], None, None, training=True)[0],
    "instance-norm": lambda flat: F.instance_norm(flat[None])[0],
    "layer-norm": lambda flat: F.layer_norm(flat, flat.shape[1:]),
    "group-norm": lambda flat: F.group_norm(flat[None], len(flat))[0],
    "mean-and-deviation": lambda flat: (
        (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)
    ),
    "unit-length": lambda flat: F.normalize(flat, dim=1),
    "softmax": lambda flat: flat.softmax(0),
}


@pytest.mark.parametrize("name", NORMS)
def test_standardized_convolutions(name: str) -> None:
    model = made(lambda s: NORMS[name](s.w.flatten(1)).view_as(s.w), 16, 8, 3, 3)
    for batch in BATCHES:
        check(model, seeded, rand(batch, 8, 4, 4), torch.randint(0, 3, (batch,)), tolerance=1e-9)


DRAWS: dict[str, Make] = {
    "noise": lambda s: s.w + F.softplus(s.spread) * torch.randn_like(s.w),
    "noise-of-rows-and-columns": lambda s: s.w + s.spread * torch.outer(
        torch.randn(len(s.w), dtype=s.w.dtype), torch.randn(s.w.shape[1], dtype=s.w.dtype)
    ),
    "normal-distribution": lambda s: torch.distributions.Normal(
        s.w, F.softplus(s.spread)
    ).rsample(),
    "dropped-weights": lambda s: F.dropout(s.w, 0.5) * (1 + s.spread),
    "dropped-rows": lambda s: F.dropout(torch.ones_like(s.w[:, :1]), 0.5) * s.w * s.spread,
    "mask": lambda s: s.w * torch.bernoulli(torch.full_like(s.w, 0.5)) + s.spread,
    "soft-choice": lambda s: s.w * F.gumbel_softmax(s.spread, dim=1),
    "uniform": lambda s: s.w + s.spread * (torch.rand(s.w.shape, dtype=s.w.dtype) - 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWS)
def test_weights_that_are_drawn(name: str) -> None:
    model = made(DRAWS[name], 16, 8, spread=0.3 * rand(16, 8))
    for batch in BATCHES:
        check(model, seeded, rand(batch, 8), torch.randint(0, 3, (batch,)))


CONSTANTS: dict[str, Make] = {
    "written": lambda s: torch.zeros_like(s.w).index_copy(0, torch.arange(len(s.w)), s.w),
    "in-place": lambda s: torch.zeros(16, 8, dtype=s.w.dtype).add_(s.w).mul_(2.0),
    "triangle": lambda s: s.w.tril() + s.w.triu(1).tanh(),
    "detached-norm": lambda s: s.w / s.w.norm(dim=1, keepdim=True).detach(),
    "low-rank": lambda s: s.w @ s.left @ s.left.t(),
    "rotation": lambda s: s.w @ torch.linalg.matrix_exp(s.left - s.left.t()),
    "cayley": lambda s: s.w @ torch.linalg.solve(
        torch.eye(8, dtype=s.w.dtype) + s.left - s.left.t(), torch.eye(8, dtype=s.w.dtype)
    ),
    "frequencies": lambda s: torch.fft.ifft2(
        torch.zeros(16, 8, dtype=s.w.dtype).index_put((torch.arange(8), torch.arange(8)), s.left[0])
    ).real + s.w,
    "distances": lambda s: torch.cdist(s.w, s.left),
    "blocks": lambda s: s.w @ torch.block_diag(s.left[:4, :4], s.left[4:, 4:]),
    "kronecker": lambda s: torch.kron(s.left[:4, :2], s.left[4:, 4:]) + s.w,
    "sinusoids": lambda s: s.w * torch.arange(16, dtype=s.w.dtype)[:, None].sin(),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANTS)
def test_weights_made_of_parameters_and_constants(name: str) -> None:
    model = made(CONSTANTS[name], 16, 8, left=0.3 * rand(8, 8))
    for batch in BATCHES:
        check(model, seeded, rand(batch, 8), torch.randint(0, 3, (batch,)))


# ---- terms of the loss ----


class Tasks(nn.Module):
    """Two heads and a weight for the loss of each."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 1)
        self.s = nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x).tanh()
        return self.one(hidden), self.two(hidden)


Weigh = Callable[[Tasks, Tensor, Tensor], Tensor]

WEIGHTS: dict[str, Weigh] = {
    "uncertainty": lambda m, a, b: (-m.s[0]).exp() * a + m.s[0] + (-m.s[1]).exp() * b + m.s[1],
    "variance": lambda m, a, b: (
        a / (2 * m.s[0] ** 2) + b / (2 * m.s[1] ** 2) + (1 + m.s**2).log().sum()
    ),
    "stacked": lambda m, a, b: ((-m.s).exp() * torch.stack([a, b]) + m.s).sum(),
    "softmax": lambda m, a, b: (m.s.softmax(0) * torch.stack([a, b])).sum(),
    "one-weight": lambda m, a, b: a + m.s[0].sigmoid() * b,
    "penalty": lambda m, a, b: a + b + 0.1 * m.body.weight.square().sum(),
    "size-of-all": lambda m, a, b: (
        a + b + 0.1 * torch.cat([param.flatten() for param in m.parameters()]).norm()
    ),
    "orthogonal-rows": lambda m, a, b: (
        a + b + (m.one.weight @ m.one.weight.t() - torch.eye(2, dtype=a.dtype)).norm()
    ),
}


@pytest.mark.parametrize("environments", [None, 3])
@pytest.mark.parametrize("name", WEIGHTS)
def test_losses_with_weights_and_penalties(name: str, environments: int | None) -> None:
    """Each environment has the same weight and the same penalty: exact, or advice that serves."""

    def step(model: nn.Module, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        one, two = model(x)
        return WEIGHTS[name](model, F.mse_loss(one, y), F.mse_loss(two, z))

    model, batch = Tasks().double(), [rand(6, 4), rand(6, 2), rand(6, 1)]
    message = refusal(lambda: check(model, step, *batch, environments=environments))
    if message:
        assert "andmask_ext.backward" in message
        parts = zip(*(tensor.chunk(environments or 6) for tensor in batch), strict=True)
        grads = loop(model, step, batch, environments)
        model.zero_grad()
        am.backward((step(model, *part) for part in parts), RULE, model.parameters())
        for param_name, param in model.named_parameters():
            torch.testing.assert_close(param.grad, RULE(grads[param_name]), msg=param_name)
