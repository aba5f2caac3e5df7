"""Nodes that are called once per environment, where a checkpointed region is in the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import andmask_ext as am
from andmask_ext.agreement import _formulas

from ..models import curved, mlp
from .exact_loop import RULE, check, loop
from .layers import Function, rand

# A region within a reentrant region is called without gradients at first.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")


Use = Callable[[Function, Tensor], Tensor]
Region = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


class Halves(torch.autograd.Function):
    """A function with two outputs, and no gradient for its second argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return (x / step).round() * step * weight, x + weight

    @staticmethod
    def backward(ctx: Any, left: Tensor, right: Tensor) -> tuple[Tensor, None, Tensor]:
        x, weight = ctx.saved_tensors
        return left * weight + right, None, (left * x + right).flatten(0, -2).sum(0)


def halves(self: Function, x: Tensor) -> Tensor:
    left, right = Halves.apply(x, self.v.abs() + 0.5, self.w)
    return left.tanh() * right


def written(self: Function, x: Tensor) -> Tensor:
    x = x * 1
    x[..., :2] = self.w[:2]
    return x


# Uses of ``w`` by nodes without a formula, or with one that does not fit.
USES: dict[str, Use] = {
    "maximum": lambda s, x: torch.maximum(x, s.w),
    "minimum": lambda s, x: torch.minimum(s.w, x),
    "lerp": lambda s, x: torch.lerp(x, x.tanh(), s.w),
    "addcmul": lambda s, x: torch.addcmul(s.w, x, x),
    "addcdiv": lambda s, x: torch.addcdiv(x, s.w, x.square() + 1),
    "where": lambda s, x: torch.where(x > 0, x, s.w),
    "pow": lambda s, x: x.abs().pow(s.w.exp()),
    "atan2": lambda s, x: torch.atan2(x, s.w),
    "copysign": lambda s, x: torch.copysign(s.w, x),
    "stack": lambda s, x: torch.stack([x, s.w.expand_as(x)]).square().sum(0),
    "written": written,
    "rows of weights": lambda s, x: x + s.w * torch.ones(*x.shape[:-1], 1, dtype=x.dtype),
    "cumulative": lambda s, x: x.cumsum(-1).maximum(s.w.cumsum(-1)),
    "a function": halves,
}


def after(s: Function, x: Tensor, use: Use, region: Region) -> Tensor:
    return region(s.b, use(s, x))


def before(s: Function, x: Tensor, use: Use, region: Region) -> Tensor:
    return use(s, region(s.b, x))


def within(s: Function, x: Tensor, use: Use, region: Region) -> Tensor:
    return s.b(region(lambda y: use(s, y), x))


def nested(s: Function, x: Tensor, use: Use, region: Region) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return region(s.b, use(s, y)).maximum(s.v)

    return region(inner, use(s, x))


def residual(s: Function, x: Tensor, use: Use, region: Region) -> Tensor:
    x = use(s, x).cumsum(-1)
    return x + region(lambda y: s.b(y.maximum(s.v)), x)


PLACES = (after, before, within, nested, residual)


def model(use: Use, place: Callable[..., Tensor], reentrant: bool = True) -> Function:
    region = partial(checkpoint, use_reentrant=reentrant)
    return Function(
        lambda s, x: place(s, s.a(x), use, region).tanh() * s.v,
        a=nn.Linear(4, 4), b=nn.Linear(4, 4), w=rand(4), v=rand(4),
    ).double()  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_once_per_environment(use: str, place: Callable[..., Tensor], reentrant: bool) -> None:
    built, agreement = model(USES[use], place, reentrant), None
    for environments in (None, torch.tensor([1, 0, 2, 1, 1, 0])):
        agreement = check(
            built, curved, rand(6, 3, 4), environments=environments, agreement=agreement
        )


@pytest.mark.parametrize("rule", [RULE, am.rules.Mean()], ids=["votes", "sums"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_in_single_precision(place: Callable[..., Tensor], rule: am.rules.Rule) -> None:
    built = model(USES["maximum"], place).float()
    check(built, curved, torch.randn(6, 4), rule=rule, tolerance=1e-4)
    check(built, curved, torch.randn(1, 4), rule=rule, tolerance=1e-4)


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM], ids=lambda layer: layer.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_recurrent_layers(layer: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    built = Function(
        lambda s, x: checkpoint(s.b, s.m(x)[0], use_reentrant=True),
        m=layer(4, 5, batch_first=True), b=nn.Linear(5, 3),
    ).to(dtype)  # fmt: skip
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    x = torch.randn(6, 3, 4, dtype=dtype, requires_grad=True)
    check(built, curved, x, tolerance=tolerance)


def test_a_gradient_that_is_left_out_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that is called in the pass of the data leaves out the gradient of a parameter."""
    monkeypatch.setattr(_formulas, "aside", lambda body: body())
    built = Function(lambda s, x: torch.maximum(s.a(x), s.w), a=nn.Linear(4, 4), w=rand(4)).double()
    with pytest.raises(RuntimeError, match=r"of MaximumBackward0, but .* left it out"):
        check(built, curved, rand(6, 4))
    assert all(param.grad is None for param in built.parameters())


# ---- backward passes of functions ----


@pytest.mark.parametrize("chosen", [["a.weight"], ["b.weight", "v"], ["w", "a.bias"]], ids=str)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_parameters_that_are_left_out(place: Callable[..., Tensor], chosen: list[str]) -> None:
    """They get their plain gradients, of which the check for mixing leaves nothing behind."""
    built, x = model(USES["maximum"], place), rand(6, 4)
    params = dict(built.named_parameters())
    plain = {name: grads.mean(0) for name, grads in loop(built, curved, [x]).items()}
    agreement = am.Agreement(built, RULE, [params[name] for name in chosen])
    for _ in range(2):
        for param in params.values():
            param.grad = torch.ones_like(param)
        with agreement():
            curved(built, x).backward()
        for name in set(params) - set(chosen):
            torch.testing.assert_close(params[name].grad, 1 + plain[name])


class Reversible(torch.autograd.Function):
    """A layer that computes its input again, and adds to the gradients of its parameters itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module, weight: Tensor | None) -> Tensor:
        ctx.layer, ctx.weight = layer, weight
        ctx.save_for_backward(x)
        return Reversible.value(x, layer, weight)

    @staticmethod
    def value(x: Tensor, layer: nn.Module, weight: Tensor | None) -> Tensor:
        return layer(x).tanh() * (1 if weight is None else weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            value = Reversible.value(x, ctx.layer, ctx.weight)
        torch.autograd.backward(value, grad)
        return x.grad, None, None


@pytest.mark.parametrize("argument", [False, True])
def test_a_function_that_runs_a_backward_pass(argument: bool) -> None:
    built = Function(
        lambda s, x: s.b(Reversible.apply(s.a(x), s.r, s.w if argument else None)),
        a=nn.Linear(4, 4), r=nn.Linear(4, 4), b=nn.Linear(4, 4), w=rand(4),
    ).double()  # fmt: skip
    x = rand(6, 4)
    message = r"runs a backward pass inside its backward.* environment\(micro_batches=None\)"
    with pytest.raises(RuntimeError, match=message), am.Agreement(built, RULE)():
        curved(built, x).backward()
    assert all(param.grad is None for param in built.parameters())
    # The remedy is exact.
    grads = loop(built, curved, [x])
    optimizer = am.optim.AndMaskSGD(built.parameters(), lr=1.0, tau=RULE.tau, rescale=RULE.rescale)
    for row in x:
        with optimizer.environment(micro_batches=None):
            curved(built, row[None]).backward()
    optimizer.write_grads()
    for name, param in built.named_parameters():
        expected = RULE(grads[name])
        got = torch.zeros_like(param) if param.grad is None else param.grad
        torch.testing.assert_close(got, expected)
    # So are the parameters that no such function reaches.
    built.zero_grad()
    free = [built.a.weight, built.b.weight]
    with am.Agreement(built, RULE, free)():
        curved(built, x).backward()
    for name in ("a.weight", "b.weight"):
        torch.testing.assert_close(built.get_parameter(name).grad, RULE(grads[name]))
    for name in ("a.bias", "r.weight", "r.bias"):
        torch.testing.assert_close(built.get_parameter(name).grad, grads[name].mean(0))


# ---- selective checkpointing ----

KEPT = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)


def policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def selective(chosen: bool) -> Function:
    contexts = partial(create_selective_checkpoint_contexts, policy)
    options = {"context_fn": contexts} if chosen else {}
    return Function(
        lambda s, x: s.b(checkpoint(s.m, s.a(x), use_reentrant=False, **options)),
        a=nn.Linear(4, 4), b=nn.Linear(4, 4), m=mlp(4, 5, 4),
    ).double()  # fmt: skip


def test_selective_checkpointing() -> None:
    """The remedies that the message names are exact."""
    x, built = rand(6, 4), selective(True)
    with pytest.raises(RuntimeError, match="leave out context_fn"), am.Agreement(built, RULE)():
        curved(built, x).backward()
    assert all(param.grad is None for param in built.parameters())
    check(built, curved, x, check_mixing="never")
    check(selective(False), curved, x)
