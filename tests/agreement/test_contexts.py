"""The context: accumulation, exceptions, what it leaves alone, and what it keeps."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module

import andmask_ext as am

from ..models import curved, mlp
from .exact_loop import RULE, check, compare, loop
from .layers import Function, rand

IDS = torch.tensor([1, 0, 2, 1, 1, 0])


def assert_grads(model: nn.Module, grads: dict[str, Tensor], rule: am.rules.Rule = RULE) -> None:
    for name, param in model.named_parameters():
        compare(name, grads[name], param.grad, rule, 1e-10)


def joined(*parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# ---- accumulation ----


def test_several_backward_passes_in_one_context_are_further_environments() -> None:
    model, batches = mlp().double(), [rand(n, 4) for n in (6, 4, 6, 1)]
    with am.Agreement(model, RULE)():
        for x in batches:
            curved(model, x).backward()
    assert_grads(model, joined(*[loop(model, curved, [x]) for x in batches]))


def test_contexts_without_resolve() -> None:
    model, batches = mlp().double(), [rand(n, 4) for n in (6, 4, 2)]
    model[0].weight.grad = torch.ones_like(model[0].weight)
    agreement = am.Agreement(model, RULE)
    for _ in range(2):
        for x in batches[:-1]:
            with agreement(2, write_grads=False):
                curved(model, x).backward()
            assert model[0].bias.grad is None
            assert (model[0].weight.grad == 1).all()
        with agreement(2):
            curved(model, batches[-1]).backward()
        model[0].weight.grad -= 1
        assert_grads(model, joined(*[loop(model, curved, [x], 2) for x in batches]))
        model.zero_grad()
        model[0].weight.grad = torch.ones_like(model[0].weight)


@pytest.mark.parametrize(
    "rule", [am.rules.GeometricMean(0.6), am.rules.SandMask(0.3, k=1.0), am.rules.Mean()]
)
def test_a_parameter_that_comes_late_had_zeros_before(rule: am.rules.Rule) -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        return self.a(x) + (self.b(x) if self.late else 0)

    model = Function(forward, a=nn.Linear(4, 3), b=nn.Linear(4, 3)).double()
    x, grads = rand(4, 4), []
    for model.late in (False, True, False):
        grads.append(loop(model, curved, [x]))
    with am.Agreement(model, rule)():
        for model.late in (False, True, False):
            curved(model, x).backward()
    for name, param in model.named_parameters():
        stack = torch.cat([g[name] for g in grads])
        compare(name, stack, param.grad, rule, 1e-7)


def test_gradients_that_were_there_are_added_to() -> None:
    model, x = mlp().double(), rand(6, 4)
    grads = loop(model, curved, [x])
    agreement = am.Agreement(model, RULE)
    for _ in range(3):
        with agreement():
            curved(model, x).backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, 3 * RULE(grads[name]))


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_within_the_context(to_none: bool) -> None:
    model, x = mlp().double(), rand(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    grads, agreement = loop(model, curved, [x]), am.Agreement(model, RULE)
    for _ in range(3):
        with agreement():
            loss = curved(model, x)
            optimizer.zero_grad(set_to_none=to_none)
            loss.backward()
        assert_grads(model, grads)


@pytest.mark.filterwarnings("ignore:Agreement. expected one backward pass for each:UserWarning")
def test_the_same_graph_twice() -> None:
    model, x = mlp().double(), rand(6, 4)
    grads = loop(model, curved, [x])
    agreement = am.Agreement(model, RULE)
    with agreement():
        loss = curved(model, x)
        loss.backward(retain_graph=True)
        loss.backward()
    assert_grads(model, joined(grads, grads))
    with pytest.raises(RuntimeError), agreement():  # noqa: PT012
        loss = curved(model, x)
        loss.backward()
        loss.backward()
    assert_grads(model, joined(grads, grads))


def test_more_environments_than_a_byte_counts() -> None:
    model = mlp().double()
    check(model, curved, rand(130, 4))
    check(model, curved, rand(300, 4), environments=torch.arange(300) % 150)


# ---- what the context leaves alone ----


def test_a_plain_backward_pass_outside_is_plain() -> None:
    model, x = mlp().double(), rand(6, 4)
    agreement = am.Agreement(model, RULE)
    with agreement():
        curved(model, x).backward()
        kept = curved(model, x)
    model.zero_grad()
    expected = torch.autograd.grad(curved(model, x), list(model.parameters()))
    kept.backward()
    for param, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.grad, grad)


def test_gradients_asked_for_within_the_context_are_plain() -> None:
    model, x = mlp().double(), rand(6, 4)
    grads = loop(model, curved, [x])
    with am.Agreement(model, RULE)():
        (plain,) = torch.autograd.grad(curved(model, x), [model[0].weight])
        curved(model, x).backward()
    torch.testing.assert_close(plain, grads["0.weight"].mean(0))
    assert_grads(model, grads)


def test_the_model_stays_as_it_was() -> None:
    model, x = mlp().double(), rand(6, 4)
    attributes = {name: set(vars(one)) for name, one in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    agreement = am.Agreement(model, RULE)
    with agreement():
        curved(model, x).backward()
    assert {name: set(vars(one)) for name, one in model.named_modules()} == attributes
    for one in model.modules():
        assert not one._forward_hooks
        assert not one._forward_pre_hooks
        assert not one._backward_hooks
    assert all(not p._backward_hooks for p in model.parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    twin, copied = pickle.loads(pickle.dumps(model)), copy.deepcopy(model)
    for other in (twin, copied):
        torch.testing.assert_close(other(x), model(x))
        check(other, curved, x)


def test_hooks_of_all_modules_are_gone() -> None:
    model, x = mlp().double(), rand(6, 4)
    agreement = am.Agreement(model, RULE)
    before = len(module._global_forward_hooks), len(module._global_forward_pre_hooks)
    with agreement():
        curved(model, x).backward()
    with pytest.raises(ZeroDivisionError), agreement():
        raise ZeroDivisionError
    assert (len(module._global_forward_hooks), len(module._global_forward_pre_hooks)) == before


# ---- exceptions ----


@pytest.mark.parametrize("where", ["before", "forward", "backward", "after"])
@pytest.mark.parametrize("optimizer", [False, True])
def test_an_exception_changes_nothing(where: str, optimizer: bool) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            if where == "forward" and model.fail:
                raise ZeroDivisionError
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            if where == "backward" and model.fail:
                raise ZeroDivisionError
            return grad

    model = Function(
        lambda s, x: s.b(Fails.apply(s.a(x)).tanh()), a=nn.Linear(4, 4), b=nn.Linear(4, 3)
    ).double()
    x, free = rand(6, 4), torch.ones(3, dtype=torch.float64, requires_grad=True)
    model.fail = False
    grads = loop(model, curved, [x])
    model.fail = True
    rule = am.optim.AndMaskSGD(model.parameters(), lr=1.0, tau=0.6, rescale=True)
    agreement = am.Agreement(model, rule if optimizer else RULE)
    if not optimizer:
        for param in model.parameters():
            param.grad = torch.ones_like(param)
    before = [(p, p.grad, p.detach().clone()) for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), agreement():  # noqa: PT012
        if where == "before":
            raise ZeroDivisionError
        (model(x).sin() * free).mean().backward()
        if where == "after":
            raise ZeroDivisionError
    for param, grad, value in before:
        assert param.grad is grad
        assert grad is None or (grad == 1).all()
        assert torch.equal(param, value)
    assert free.grad is None or where == "after"
    model.fail = False
    model.zero_grad()
    rule.zero_grad()
    with agreement():
        curved(model, x).backward()
    if optimizer:
        rule.write_grads()
    assert_grads(model, grads)


def test_an_exception_that_is_caught_within() -> None:
    """A step that is tried again with half the batch, say."""

    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 4:
                raise MemoryError
            return x

    model = nn.Sequential(nn.Linear(4, 4), Large(), nn.Linear(4, 3)).double()
    x = rand(6, 4)
    grads = loop(model, curved, [x])
    with am.Agreement(model, RULE)():
        try:
            curved(model, x).backward()
        except MemoryError:
            for part in x.split(3):
                curved(model, part).backward()
    assert_grads(model, grads)


def test_one_context_at_a_time() -> None:
    model, x = mlp().double(), rand(6, 4)
    agreement, other = am.Agreement(model, RULE), am.Agreement(mlp().double(), RULE)
    grads = loop(model, curved, [x])
    with agreement():
        with pytest.raises(RuntimeError, match="inside another"), agreement():
            pass
        with pytest.raises(RuntimeError, match="outside"):
            agreement.detach()
        with pytest.raises(RuntimeError, match="one open context at a time"), other():
            pass
        curved(model, x).backward()
    assert_grads(model, grads)
    agreement.detach()
    with pytest.raises(RuntimeError, match="detach"), agreement():
        pass


# ---- what it keeps ----


def test_moments_are_kept_if_asked_for() -> None:
    model, x = mlp().double(), rand(6, 4)
    agreement = am.Agreement(model, RULE)
    with agreement():
        curved(model, x).backward()
    with pytest.raises(RuntimeError, match="keep_moments=True"):
        agreement.moments  # noqa: B018
    agreement = am.Agreement(model, RULE, keep_moments=True)
    for environments, count in ((None, 6), (2, 2), (IDS, 3)):
        with agreement(environments):
            curved(model, x).backward()
        (moments,) = agreement.moments
        assert moments.count == count
    assert moments.sum[0].shape == model[0].weight.shape


def test_the_memory_of_the_graph_is_freed() -> None:
    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.kept = marker = x.new_ones(1)
            alive.append(weakref.ref(marker))
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return grad

    alive: list[weakref.ref[Tensor]] = []
    model = Function(lambda s, x: Marked.apply(s.m(x)), m=mlp()).double()
    agreement, x = am.Agreement(model, RULE), rand(6, 4)
    with agreement():
        curved(model, x).backward()
    gc.collect()
    assert alive
    assert all(one() is None for one in alive)


def test_the_parentheses_are_missing() -> None:
    agreement: Any = am.Agreement(nn.Linear(2, 1), am.AndMask(0.5))
    with pytest.raises(TypeError, match=r"expected `with agreement\(\):`, with parentheses"):
        with agreement:
            pass
