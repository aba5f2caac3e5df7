"""Parameters that are used several times, in several ways, or as something made of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import andmask_ext as am

from ..models import curved
from .exact_loop import RULE, check, loop
from .layers import Function, rand

IDS = torch.tensor([1, 0, 2, 1, 1, 0])
ENVIRONMENTS = pytest.mark.parametrize("environments", [None, 2, IDS], ids=["each", "2", "ids"])


# ---- several uses ----


class Tied(nn.Module):
    """An embedding, the same weight as head, as a linear layer, and as data of another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.table.weight
        hidden = self.mix(self.table(ids)).tanh()
        hidden = hidden + self.mix(F.linear(hidden, weight) @ weight)
        hidden = hidden * weight[2] + F.linear(hidden, weight[1:5])
        return F.linear(hidden, weight + self.mix(weight))


@ENVIRONMENTS
@pytest.mark.parametrize("tokens", [3, 6])
def test_tied_weights(environments: int | Tensor | None, tokens: int) -> None:
    check(Tied().double(), curved, torch.randint(0, 7, (6, tokens)), environments=environments)


def _loop_of_layers(self: Function, x: Tensor) -> Tensor:
    for _ in range(3):
        x = self.norm(x + self.layer(x).tanh())
    return x


USES: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "layers with one weight": _loop_of_layers,
    "weight and its transpose": lambda s, x: (x @ s.w).tanh() @ s.w.t(),
    "row by row": lambda s, x: torch.stack([x @ row for row in s.w], -1).tanh() @ s.w,
    "in the maximum, twice": lambda s, x: torch.maximum(torch.maximum(x @ s.w, s.v) * 2, s.v),
    "below a node that uses it": lambda s, x: torch.maximum((x @ s.w) * s.v, s.v),
    "twice in one node": lambda s, x: torch.addcmul(s.v, x, s.v) + torch.lerp(x, s.v, s.v),
    "in place, twice": lambda s, x: s.layer(x).add_(s.v).mul_(s.v).add_(s.v),
    "computed once, used below itself": lambda s, x: _computed(s, x),
    "weight of a product of itself": lambda s, x: x @ (s.w @ s.w) @ (s.w * s.w.t()),
    "data and weight": lambda s, x: s.layer(s.w)[0] + x @ s.layer.weight @ s.w,
    "several columns": lambda s, x: s.v[0] * x + s.v[1:3].sum() * x + x[..., :2] @ s.v[2:, None],
    "overlapping rows": lambda s, x: F.linear(x, s.w[:3]).sum(-1, True) + F.linear(x, s.w[1:]),
    "written into a buffer": lambda s, x: _written(s, x),
    "scalars": lambda s, x: s.a * x.tanh() + s.a.exp() * x + s.a / (2 + x.sin()),
    "complex": lambda s, x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(s.v), n=4),
}  # fmt: skip


def _computed(self: Function, x: Tensor) -> Tensor:
    v = self.v.tanh()
    return torch.maximum(torch.maximum(x * v, v) * 2, v)


def _written(self: Function, x: Tensor) -> Tensor:
    out = x.clone()
    out[..., 0] = self.v[0]
    out[..., 1:] *= self.v[1:]
    return out + self.v


@pytest.mark.parametrize("rows", [(), (3,), (6,)], ids=str)
@pytest.mark.parametrize("use", USES)
def test_uses_add_up_before_they_vote(use: str, rows: tuple[int, ...]) -> None:
    model = Function(
        USES[use], w=rand(4, 4), v=rand(4), a=rand(), layer=nn.Linear(4, 4), norm=nn.LayerNorm(4)
    ).double()
    for environments in (None, IDS):
        check(model, curved, rand(6, *rows, 4), environments=environments)


# ---- modules of torch ----


class First(nn.Module):
    """The first output of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)[0]


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("layers", "bidirectional", "steps"), [(2, True, 3), (1, False, 6)])
def test_recurrent(
    kind: type[nn.RNNBase], batch_first: bool, layers: int, bidirectional: bool, steps: int
) -> None:
    model = First(kind(3, 4, layers, batch_first=batch_first, bidirectional=bidirectional))
    shape = (6, steps, 3) if batch_first else (steps, 6, 3)
    dim = 0 if batch_first else 1
    for environments in (None, IDS):
        check(
            model.double(), curved, rand(*shape), environments=environments, dims=[dim],
            batch_dim=dim,
        )  # fmt: skip


def test_recurrent_with_a_projection_and_a_state() -> None:
    model = First(nn.LSTM(3, 4, proj_size=2, batch_first=True)).double()

    def step(model: nn.Module, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return curved(First(model.module), x, (h.transpose(0, 1), c.transpose(0, 1)))

    check(model, step, rand(5, 3, 3), rand(5, 1, 2), rand(5, 1, 4))


def test_cells_in_a_loop() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.start = nn.GRUCell(3, 4), nn.Parameter(torch.randn(1, 4))

        def forward(self, x: Tensor) -> Tensor:
            state = self.start.expand(len(x), -1)
            for t in range(x.shape[1]):
                state = self.cell(x[:, t], state)
            return state

    check(Loop().double(), curved, rand(4, 4, 3))


@ENVIRONMENTS
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention(environments: int | Tensor | None, batch_first: bool) -> None:
    dim = 0 if batch_first else 1
    x, y = (rand(6, t, 4) if batch_first else rand(t, 6, 4) for t in (6, 3))
    for extra in ({}, {"add_bias_kv": True}, {"kdim": 4, "vdim": 4}):
        model = First(nn.MultiheadAttention(4, 2, batch_first=batch_first, **extra)).double()
        options = {"environments": environments, "batch_dim": dim}
        check(model, lambda m, x: curved(m, x, x, x), x, dims=[dim], **options)
        check(model, lambda m, x, y: curved(m, x, y, y), x, y, dims=[dim, dim], **options)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer(batch_first: bool, norm_first: bool) -> None:
    model = nn.Transformer(
        4, 2, 1, 1, 6, dropout=0.0, batch_first=batch_first, norm_first=norm_first
    ).double()
    dim = 0 if batch_first else 1
    x, y = (rand(4, t, 4) if batch_first else rand(t, 4, 4) for t in (4, 3))
    check(model, curved, x, y, dims=[dim, dim], batch_dim=dim)


# ---- custom functions ----


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum_to_size(w.shape)


class Split(torch.autograd.Function):
    """Two outputs, and an argument that is no tensor."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w)
        ctx.factor = factor
        return x @ w * factor, x + w[0]

    @staticmethod
    def backward(ctx, left: Tensor, right: Tensor) -> tuple[Tensor, None, Tensor]:
        x, w = ctx.saved_tensors
        grad = ctx.factor * x.flatten(0, -2).t() @ left.flatten(0, -2)
        grad[0] += right.flatten(0, -2).sum(0)
        return ctx.factor * left @ w.t() + right, None, grad


class Round(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, w: Tensor) -> Tensor:
        return w.round()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize("rows", [(), (6,)], ids=str)
def test_custom_functions(rows: tuple[int, ...]) -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        for _ in range(2):
            left, right = Split.apply(Scale.apply(x, self.v), 0.5, self.w)
            x = Scale.apply(left, self.v) + right
        return F.linear(x, Round.apply(self.w))

    model = Function(forward, w=rand(4, 4), v=rand(4))
    for environments in (None, IDS):
        check(model, curved, rand(6, *rows, 4), environments=environments)


def test_only_one_output_of_a_custom_function() -> None:
    for which in (0, 1):
        model = Function(lambda s, x, which=which: Split.apply(x, 2.0, s.w)[which], w=rand(4, 4))
        check(model, curved, rand(6, 4))


# ---- weights that are made of parameters ----


class Lora(nn.Module):
    def __init__(self, width: int, merged: bool) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, width))
        self.b = nn.Parameter(torch.zeros(width, 2))
        self.merged = merged

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base.weight + self.b @ self.a, self.base.bias)
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("rows", [(), (3,), (6,)], ids=str)
def test_low_rank_adapters_from_zero_on(merged: bool, width: int, rows: tuple[int, ...]) -> None:
    """At first a has no gradient: where the batch lies in its output cannot be seen."""
    model, agreement = Lora(width, merged).double(), None
    for _ in range(3):
        agreement = check(model, curved, rand(6, *rows, width), agreement=agreement)
        with torch.no_grad():
            model.b += 0.1 * torch.randn_like(model.b)


def _pruned(layer: nn.Module) -> nn.Module:
    prune.random_unstructured(layer, "weight", 0.4)
    mask = layer.weight_mask
    prune.remove(layer, "weight")

    class Mask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.mask

    parametrize.register_parametrization(layer, "weight", Mask())
    return layer


MADE: dict[str, Callable[[int], nn.Module]] = {
    "weight norm": lambda n: parametrizations.weight_norm(nn.Linear(n, n)),
    "spectral norm": lambda n: parametrizations.spectral_norm(nn.Linear(n, n)).eval(),
    "orthogonal": lambda n: parametrizations.orthogonal(nn.Linear(n, n)),
    "pruned": lambda n: _pruned(nn.Linear(n, n)),
    "weight norm of a convolution": lambda n: nn.Sequential(
        nn.Unflatten(1, (1, n)), parametrizations.weight_norm(nn.Conv1d(1, n, 3, padding=1))
    ),
}


@pytest.mark.parametrize("made", MADE)
def test_weights_made_of_parameters(made: str) -> None:
    model = MADE[made](5).double()
    for environments in (None, IDS):
        check(model, curved, rand(6, 5), environments=environments)


def test_where_sizes_coincide_weights_made_of_parameters() -> None:
    """A product of a parameter with constants [6, 6] could hold a batch of 6 examples."""
    for build in MADE.values():
        check(build(6).double(), curved, rand(6, 6))


def test_a_mask_on_one_hot_inputs_and_then_on_others() -> None:
    """Gradients that are zero by chance tell nothing of the next batch."""
    model, agreement = _pruned(nn.Linear(4, 4)).double(), None
    for x in (torch.eye(4, dtype=torch.float64), rand(4, 4)):
        agreement = check(model, curved, x, agreement=agreement)


def test_the_report_counts_the_uses() -> None:
    model = Tied().double()
    agreement = check(model, curved, torch.randint(0, 7, (6, 3)))
    lines = {line.name: line for line in agreement.report()}
    assert lines["table.weight"].uses == 6
    assert lines["mix.weight"].uses >= 2
    assert "table.weight" in str(agreement.report())


def test_parameters_that_are_not_used_get_no_gradient() -> None:
    model = Function(lambda s, x: s.used(x), used=nn.Linear(3, 3), idle=nn.Linear(3, 3)).double()
    x = rand(4, 3)
    expected = loop(model, curved, [x])["used.weight"]
    with am.Agreement(model, RULE)():
        curved(model, x).backward()
    assert model.idle.weight.grad is None
    torch.testing.assert_close(model.used.weight.grad, RULE(expected))
