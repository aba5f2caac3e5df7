"""Functions of parameters: what torch's formulas make of the gradients that they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import curved
from .exact_loop import check
from .layers import Function, rand

IDS = torch.tensor([1, 0, 2, 1, 1, 0])
ENVIRONMENTS = pytest.mark.parametrize("environments", [None, 2, IDS], ids=["each", "2", "ids"])


class Rounded(torch.autograd.Function):
    """Rounds to multiples of a step, which has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor) -> Tensor:
        return (x / step).round() * step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def with_sign(s: Function, x: Tensor) -> Tensor:
    sign, logarithm = torch.linalg.slogdet(s.w)
    return (x @ s.w) * sign + logarithm


def only_a_sign(s: Function, x: Tensor) -> Tensor:
    return (x @ s.v) * torch.linalg.slogdet(s.w).sign


WITHOUT_GRADIENT: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "of weights": lambda s, x: x @ Rounded.apply(s.w, s.step),
    "of data": lambda s, x: Rounded.apply(x @ s.w, s.step),
    "of both": lambda s, x: Rounded.apply(x, s.w[0]) @ s.v,
    "nothing but steps": lambda s, x: x @ s.v + Rounded.apply(s.w.detach(), s.step).sum(),
    "a sign": with_sign,
    "only a sign": only_a_sign,
}


@ENVIRONMENTS
@pytest.mark.parametrize("use", WITHOUT_GRADIENT)
def test_parameters_without_a_gradient(use: str, environments: int | Tensor | None) -> None:
    model = Function(WITHOUT_GRADIENT[use], w=rand(4, 4), v=rand(4, 4), step=rand().abs())
    check(model, curved, rand(6, 4), environments=environments)


def scattered(size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Any:
    return lambda s, x: (
        x.unflatten(1, (2, 2))
        * torch.as_strided_scatter(
            s.w, s.v.flatten()[: torch.Size(size).numel()].view(size), size, stride, offset
        )
    )


# Formulas that read a gradient from the beginning of its memory.
PLACES: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "scattered": scattered((2, 1), (2, 1), 0),
    "scattered from 1": scattered((2,), (1,), 1),
    "strided": lambda s, x: x * s.w.as_strided((4,), (1,), 0),
    "strided from 1": lambda s, x: x * s.v.as_strided((2, 2), (1, 1), 1).flatten(),
    "a strided copy": lambda s, x: x * torch.as_strided_copy(s.v, (4,), (1,), 0),
}


@ENVIRONMENTS
@pytest.mark.parametrize("use", PLACES)
def test_places_in_memory(use: str, environments: int | Tensor | None) -> None:
    check(
        Function(PLACES[use], w=rand(2, 2), v=rand(2, 2)), curved, rand(6, 4),
        environments=environments,
    )  # fmt: skip


CASTS: dict[str, Callable[[Function, Tensor, torch.dtype], Tensor]] = {
    "product": lambda s, x, to: x * s.w[0].to(to),
    "matrix product": lambda s, x, to: x @ s.w.to(to),
    "linear": lambda s, x, to: F.linear(x, s.w.to(to), s.b.to(to)),
    "a slice": lambda s, x, to: F.linear(x[:, 1:], s.w[:, 1:].to(to)),
    "a cast slice": lambda s, x, to: F.linear(x[:, 1:], s.w.to(to)[:, 1:]),
    "convolution": lambda s, x, to: F.conv1d(x[:, None], s.w[:, None, :3].to(to), s.b.to(to)),
    "table": lambda s, x, to: F.embedding((x > 0).long(), s.w.to(to)),
    "norm": lambda s, x, to: F.layer_norm(x, (4,), s.b.to(to), s.w[0].to(to)),
    "maximum": lambda s, x, to: torch.maximum(x, s.b.to(to)),
    "complex": lambda s, x, to: (1j * x * s.b.to(to.to_complex())).imag,
    "function": lambda s, x, to: x @ s.w.to(to).tanh(),
    "both": lambda s, x, to: x * s.b.to(to) + (x.to(s.b) * s.b).to(to) + F.linear(x, s.w.to(to)),
}  # fmt: skip


@ENVIRONMENTS
@pytest.mark.parametrize("use", CASTS)
@pytest.mark.parametrize(
    ("kept", "used"),
    [(torch.float32, torch.float64), (torch.float64, torch.float32),
     (torch.bfloat16, torch.float64)],
    ids=str,
)  # fmt: skip
def test_another_precision(
    use: str, kept: torch.dtype, used: torch.dtype, environments: int | Tensor | None
) -> None:
    model = Function(
        lambda s, x: CASTS[use](s, x.to(used), used).double(), w=rand(4, 4), b=rand(4)
    ).to(kept)
    tolerance = 0.05 if kept == torch.bfloat16 else 1e-4
    check(model, curved, rand(6, 4), environments=environments, tolerance=tolerance)


# The batch is a dimension of what is usually the parameter.
MADE_OF_DATA: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "kernels": lambda s, x: F.conv1d(s.w[None], x[:, :, None])[0],
    "kernels and biases": lambda s, x: F.conv1d(s.w[None], x[:, :, None], x[:, 0])[0],
    "transposed kernels": lambda s, x: F.conv_transpose1d(s.w[None], x.t()[:, :, None])[0],
    "matrices": lambda s, x: F.bilinear(s.w, s.v, x[:, :, None] * x[:, None]).t(),
    "table": lambda s, x: F.embedding_bag(
        torch.arange(4).view(2, 2), x.t(), mode="sum", per_sample_weights=s.w[:2, :2]
    ).t(),
}


@ENVIRONMENTS
@pytest.mark.parametrize("use", MADE_OF_DATA)
def test_data_in_the_place_of_parameters(use: str, environments: int | Tensor | None) -> None:
    model = Function(MADE_OF_DATA[use], w=rand(4, 4), v=rand(4, 4))
    check(model, curved, rand(6, 4), environments=environments)


EMPTY: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "columns": lambda s, x: torch.cat([x @ s.w[:, 1:], x @ s.w], 1),
    "only columns": lambda s, x: torch.cat([x @ s.w[:, 1:], x @ s.v], 1),
    "rows": lambda s, x: x[:, 4:] @ s.w[4:] + x @ s.w,
    "bias": lambda s, x: torch.cat([F.linear(x, s.v[:0], s.v[0, :0]), x @ s.v], 1),
    "product": lambda s, x: torch.cat([x[:, 4:] * s.v[0, 4:], x @ s.v], 1),
    "maximum": lambda s, x: torch.cat([x[:, 4:].maximum(s.v[0, 4:]), x @ s.v], 1),
    "lines": lambda s, x: torch.cat([F.embedding((x > 0).long(), s.v[:, :0]).flatten(1),
                                     x @ s.v], 1),
    "function": lambda s, x: torch.cat([x @ s.w[:, 1:].tanh(), x @ s.w], 1),
    "nothing else": lambda s, x: x[:, 4:].cos() * s.v[0, 4:].cos(),
}  # fmt: skip


@ENVIRONMENTS
@pytest.mark.parametrize("use", EMPTY)
def test_no_elements(use: str, environments: int | Tensor | None) -> None:
    check(
        Function(EMPTY[use], w=rand(4, 1), v=rand(4, 4)), curved, rand(6, 4),
        environments=environments,
    )  # fmt: skip


def test_a_quantised_linear_layer() -> None:
    layer = nn.Linear(4, 4)
    model = Function(
        lambda s, x: F.linear(x, Rounded.apply(s.a.weight, s.step), s.a.bias), a=layer, step=rand()
    )
    check(model.double(), curved, rand(6, 4))


# ---- views of square parameters ----

TURNS = {
    "t": lambda w: w.t(),
    "mT": lambda w: w.mT,
    "copy": lambda w: w.t().clone(),
    "turned": lambda w: w.permute(1, 0),
    "flattened": lambda w: w.t().flatten().view(4, 4),
    "block": lambda w: w[None].permute(2, 0, 1)[:, 0],
}


@pytest.mark.parametrize("joined", [torch.mul, torch.add, torch.maximum], ids=lambda f: f.__name__)
@pytest.mark.parametrize("turn", TURNS)
def test_a_square_parameter_that_is_turned(turn: str, joined: Callable[..., Tensor]) -> None:
    """The turned view has the size of the parameter, and other places for its elements."""
    model = Function(lambda self, x: joined(x, TURNS[turn](self.w)).tanh(), w=rand(4, 4)).double()
    for environments in (None, 2, torch.tensor([0, 1, 1, 0, 2, 2])):
        check(model, curved, rand(6, 4, 4), environments=environments)
