"""What models take and return, and arguments, right and wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am

from ..models import curved, mlp
from .exact_loop import RULE, check, loop
from .layers import Function, rand

IDS = torch.tensor([1, 0, 2, 1, 1, 0])


# ---- what models take and return ----


@dataclasses.dataclass
class Output:
    logits: Tensor
    extra: dict[str, Tensor]


RETURNS: dict[str, tuple[Callable[[Tensor], object], Callable[..., Tensor]]] = {
    "tensor": (lambda out: out, lambda out: out),
    "tuple": (lambda out: (out.tanh(), [out]), lambda out: out[1][0] * out[0]),
    "dict": (lambda out: {"a": out.tanh(), "b": {"c": out}}, lambda out: out["a"] + out["b"]["c"]),
    "dataclass": (lambda out: Output(out, {"x": out.exp()}), lambda o: o.logits * o.extra["x"]),
    "loss and output": (lambda out: (out.sin().mean(), out), lambda out: out[0]),
}


@pytest.mark.parametrize("kind", RETURNS)
def test_models_return_all_kinds_of_things(kind: str) -> None:
    wrap, unwrap = RETURNS[kind]
    model = Function(lambda s, x: wrap(s.m(x)), m=mlp()).double()
    for environments in (None, IDS):
        check(model, lambda m, x: unwrap(m(x)).mean(), rand(6, 4), environments=environments)


def test_models_take_all_kinds_of_things() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = mlp().double()

        def forward(self, *, scale: float, batch: dict[str, list[Tensor]]) -> Tensor:
            return self.m(batch["x"][0]) * scale + batch["x"][1]

    def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return model(scale=2.0, batch={"x": [x, y]}).sin().mean()

    check(Model(), step, rand(6, 4), rand(6, 3))


def test_parts_of_the_model_called_one_after_the_other() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": mlp(), "c": nn.Linear(4, 3)}).double()

    def step(model: nn.Module, x: Tensor) -> Tensor:
        hidden = model["a"](x).tanh()
        return (model["b"](hidden) * model["c"](hidden + 1)).sin().mean()

    check(model, step, rand(6, 4), environments=IDS)

    def mixing(model: nn.Module, x: Tensor) -> Tensor:
        hidden = model["a"](x)
        return model["b"](hidden - hidden.mean(0)).sin().mean()

    x = rand(6, 4)
    with pytest.raises(RuntimeError, match="environments mix"), am.Agreement(model, RULE)():
        mixing(model, x).backward()


def test_the_model_called_twice_in_one_loss() -> None:
    model = mlp().double()

    def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model(x), model(y)) + model(x).sin().mean()

    check(model, step, rand(6, 4), rand(6, 4), environments=IDS)


@pytest.mark.parametrize("side_by_side", [True, False])
def test_several_views_of_each_example(side_by_side: bool) -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        views = torch.stack([x, x.tanh()], 0 if side_by_side else 1)
        out = self.m(views.flatten(0, 1)).exp()
        return out.unflatten(0, views.shape[:2]).prod(0 if side_by_side else 1)

    for environments in (None, IDS):
        check(Function(forward, m=mlp().double()), curved, rand(6, 4), environments=environments)


def test_scalar_outputs_of_each_example() -> None:
    model = Function(lambda s, x: s.m(x)[:, 0], m=mlp()).double()
    check(model, curved, rand(6, 4), environments=IDS)
    check(model, lambda m, x: F.binary_cross_entropy_with_logits(m(x), (x[:, 0] > 0).double()),
          rand(6, 4))  # fmt: skip


# ---- arguments ----


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": lambda x: x}, TypeError, "model: expected a torch.nn.Module, but got function"),
        ({"optimizer_or_rule": am.AndMask}, TypeError, "optimizer_or_rule: .* got AndMask"),
        ({"optimizer_or_rule": 0.5}, TypeError, "optimizer_or_rule: .* but got float"),
        ({"optimizer_or_rule": am.rules.Median()}, TypeError, r"rule: .* but Median\(\)"),
        ({"optimizer_or_rule": lambda g: g.mean(0)}, TypeError, "but got function"),
        ({"loss_reduction": "none"}, ValueError, "loss_reduction: .* 'none'"),
        ({"batch_dim": -1}, ValueError, "batch_dim: .* -1"),
        ({"batch_dim": 1.0}, ValueError, "batch_dim: .* 1.0"),
        ({"params": []}, ValueError, "params: expected at least one"),
        ({"params": ["weight"]}, TypeError, r"params\[0\]: expected a Tensor, but got str"),
        ({"params": [torch.ones(2)]}, ValueError, r"params\[0\]: expected a leaf"),
        ({"params": [torch.ones(2, requires_grad=True) * 2]}, ValueError, r"params\[0\]: .* leaf"),
        ({"model": nn.Identity()}, ValueError, "params: expected at least one"),
        (
            {"params": [torch.ones(2, dtype=torch.complex64, requires_grad=True)]},
            TypeError, r"params\[0\]: expected dtype .* complex64",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        am.Agreement(**{"model": nn.Linear(2, 2), "optimizer_or_rule": RULE, **arguments})


@pytest.mark.parametrize(
    ("environments", "error", "message"),
    [
        (0, ValueError, "environments: expected a positive number, but got 0"),
        (True, TypeError, "environments: .* but got bool"),
        (2.0, TypeError, "environments: .* but got float"),
        ("012210", TypeError, "environments: .* but got str"),
        ([[0, 1]] * 6, TypeError, r"shape \(6, 2\)"),
        (4, ValueError, "divides the batch of 6 examples, but got 4"),
        (12, ValueError, "divides the batch of 6 examples, but got 12"),
        (torch.arange(6).float(), TypeError, "integer ids .* float32"),
        (torch.arange(6)[None], TypeError, r"shape \(1, 6\)"),
        (torch.arange(5), ValueError, "one id for each .* 6.* but got 5"),
        ([0, 1], ValueError, "one id for each .* 6.* but got 2"),
        (torch.arange(0), ValueError, "at least 1 example"),
    ],
)
def test_wrong_environments(environments: object, error: type[Exception], message: str) -> None:
    model, x = mlp().double(), rand(6, 4)
    agreement = am.Agreement(model, RULE)
    with pytest.raises(error, match=message), agreement(environments):
        curved(model, x).backward()
    assert all(p.grad is None for p in model.parameters())
    with agreement():
        curved(model, x).backward()


@pytest.mark.parametrize(
    "ids",
    [
        [1, 0, 2, 1, 1, 0],
        (7, -3, 100, 7, 7, -3),
        numpy.array([7, 5, 9, 7, 7, 5], dtype=numpy.uint16),
        torch.tensor([1, 0, 2, 1, 1, 0], dtype=torch.int8),
        torch.tensor([3, 1, 2**40, 3, 3, 1]),
    ],
    ids=["list", "negative", "array", "int8", "gaps"],
)
def test_ids_of_any_kind(ids: object) -> None:
    """They name the environments: all these are the same partition."""
    model, x = mlp().double(), rand(6, 4)
    grads = loop(model, curved, [x], IDS)
    agreement = am.Agreement(model, RULE, keep_moments=True)
    for _ in range(2):
        model.zero_grad()
        with agreement(ids):
            curved(model, x).backward()
        assert agreement.moments[0].count == 3
        for name, param in model.named_parameters():
            torch.testing.assert_close(param.grad, RULE(grads[name]), msg=name)
