"""What would lose gradients in silence is refused by name, or said once."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import andmask_ext as am

from .common import MAKERS, assert_equal, backward, environments, parameters, random_grads, values

makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
DROPPED = "complete ones, which no step has used, are dropped; call zero_grad"


def one_backward(params: list[nn.Parameter]) -> None:
    backward(params, [stack[0] for stack in random_grads(params)])


@contextmanager
def heard() -> Iterator[list[str]]:
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        yield messages
    messages.extend(str(one.message) for one in given)


# ---- one gradient, one step ----


@makers
def test_contexts_of_two_optimizers_over_one_parameter(make: Any) -> None:
    params = parameters()
    one, other = make(params), make([*parameters(), params[1]])
    with one.environment():
        with pytest.raises(RuntimeError, match=r"parameter 3 of shape \(\) belongs to another"):
            other.environment().__enter__()
        one_backward(params)
    with other.environment():  # the remedy: one after the other
        one_backward(params[1:2])
    one.step()
    other.step()


def test_a_frozen_parameter_may_be_shared() -> None:
    params = parameters()
    one, other = MAKERS["sgd"](params), MAKERS["sgd"]([*params[:1], *parameters()])
    params[0].requires_grad_(False)
    with one.environment(), other.environment():
        one_backward(params[1:])


def test_an_agreement_inside_an_environment_over_the_same_parameters() -> None:
    model = nn.Linear(3, 2)
    optimizer = MAKERS["sgd"](model.parameters())
    agreement = am.Agreement(model, am.AndMask(0.5))
    with optimizer.environment():
        with pytest.raises(RuntimeError, match="belongs to another optimizer or Agreement"):
            agreement().__enter__()
        model(torch.randn(4, 3)).mean().backward()
    optimizer.step()


@makers
@pytest.mark.parametrize("kind", ["torch", "ours", "temporal", "context of Agreement"])
def test_a_step_inside_a_context(make: Any, kind: str) -> None:
    model = nn.Linear(3, 2)
    params = list(model.parameters())
    optimizer = make(params)
    steps = {"temporal": am.optim.TemporalAndMaskAdam(params[:1], tau=0.5), "ours": optimizer}
    stepped = steps.get(kind, torch.optim.SGD(params[1:], lr=0.1))
    context = am.Agreement(model, am.AndMask(0.5))() if kind[0] == "c" else optimizer.environment()
    before = values(params)

    def step_inside() -> None:
        with context:
            model(torch.randn(4, 3)).mean().backward()
            stepped.step()

    with pytest.raises(RuntimeError, match="step: expected to be called outside of an environm"):
        step_inside()
    assert_equal(params, before)
    optimizer.zero_grad()
    other = nn.Linear(2, 1)
    with optimizer.environment():  # an optimizer of other parameters may
        other(model(torch.randn(4, 3)).detach()).mean().backward()
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        model(torch.randn(4, 3)).mean().backward()
    optimizer.step()
    assert not sys.modules["torch.optim.optimizer"]._global_optimizer_pre_hooks


# ---- hooks of the user ----


@makers
@pytest.mark.parametrize("first", [False, True])
def test_hooks_of_the_user_see_the_gradient(make: Any, first: bool) -> None:
    param = nn.Parameter(torch.ones(2))
    optimizer, seen = make([param]), []
    if not first:
        environments(optimizer, [param], [torch.ones(1, 2)])  # its hook is there already
        optimizer.step()
    param.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.tolist()))
    environments(optimizer, [param], [torch.tensor([[1.0, 2.0], [3.0, 4.0]])])
    optimizer.step()
    assert seen == [[1.0, 2.0], [3.0, 4.0]]


@makers
def test_an_optimizer_in_backward_is_refused(make: Any) -> None:
    param = nn.Parameter(torch.ones(2))
    optimizer, inner = make([param]), torch.optim.SGD([param], lr=0.1)

    def step(_: torch.Tensor) -> None:
        inner.step()
        inner.zero_grad()

    def by_hand(param: torch.Tensor) -> None:
        param.grad = None

    for hook, message in ((step, r"got SGD.step\(\) while"), (by_hand, "such as an optimizer in")):
        handle = param.register_post_accumulate_grad_hook(hook)
        with pytest.raises(RuntimeError, match=message):
            environments(optimizer, [param], [torch.ones(1, 2)])
        assert param.tolist() == [1.0, 1.0]
        handle.remove()
        optimizer.zero_grad()
    environments(optimizer, [param], [torch.ones(1, 2)])
    optimizer.step()


# ---- zero_grad ----


@makers
def test_zero_grad_before_each_environment_is_said_once(make: Any) -> None:
    params = parameters()
    optimizer = make(params)
    with heard() as messages:
        for _ in range(2):
            for _ in range(3):
                optimizer.zero_grad()
                with optimizer.environment():
                    one_backward(params)
            optimizer.step()
    assert len(messages) == 1
    assert "but 1 complete" in messages[0]
    assert DROPPED in messages[0]


@makers
def test_zero_grad_in_its_place_says_nothing(make: Any) -> None:
    params = parameters()
    optimizer = make(params, expected_environments=3)
    with heard() as messages:
        for _ in range(2):  # before the first environment, and after the step
            optimizer.zero_grad()
            environments(optimizer, params, random_grads(params))
            optimizer.step()
            optimizer.zero_grad()
        environments(optimizer, params, random_grads(params, 2))
        with pytest.raises(RuntimeError, match="expected 3 environments"):
            optimizer.step()
        optimizer.zero_grad()  # as the error says
        environments(optimizer, params, random_grads(params))
        optimizer.write_grads()
        optimizer.zero_grad()  # a step is skipped
        environments(optimizer, params, random_grads(params))
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.zero_grad()  # a step is skipped
        environments(optimizer, params, random_grads(params))
        try:
            raise KeyError("out of data")
        except KeyError:
            optimizer.zero_grad()
        with pytest.raises(KeyError), optimizer.environment():
            raise KeyError("out of data")
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        with optimizer.environment(grad_scaler=scaler):
            scaler.scale((params[0] * float("inf")).sum()).backward()
        optimizer._expected = 1
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert messages == []


@makers
def test_zero_grad_between_forward_and_backward(make: Any) -> None:
    params = parameters()
    optimizer = make(params, tau=0.0)
    environments(optimizer, params, random_grads(params))
    grads = random_grads(params, 1)
    with optimizer.environment():
        with pytest.warns(UserWarning, match="but 3 complete"):
            optimizer.zero_grad()
        backward(params, [stack[0] for stack in grads])
        with pytest.raises(RuntimeError, match=r"zero_grad: .* or before its backward pass"):
            optimizer.zero_grad()
    for param, stack in zip(params, grads, strict=True):
        torch.testing.assert_close(param.grad * 1, stack[0])
    optimizer.step()


def test_zero_grad_in_the_context_of_an_agreement() -> None:
    x, grads = torch.randn(4, 3), []
    for inside in (False, True):
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        optimizer = am.optim.AndMaskSGD(model.parameters(), lr=0.1, tau=0.5)
        with am.Agreement(model, optimizer)():
            loss = model(x).square().mean()
            if inside:
                optimizer.zero_grad()
            loss.backward()
        grads.append(model.weight.grad * 1)
        optimizer.step()
    assert torch.equal(*grads)


# ---- parameters that change ----


@makers
def test_a_parameter_that_is_replaced(make: Any) -> None:
    params = parameters()
    optimizer = make(params)
    environments(optimizer, params, random_grads(params))
    group = optimizer.param_groups[0]["params"]
    group[0] = nn.Parameter(torch.zeros(3, 4))
    for call in (optimizer.step, optimizer.write_grads, optimizer.environment().__enter__):
        with pytest.raises(RuntimeError, match=r"param_groups: .* have been replaced"):
            call()
    optimizer.zero_grad()
    before = values(params)
    grads = [stack.abs() + 1 for stack in random_grads(group)]
    environments(optimizer, group, grads)
    optimizer.step()
    assert torch.equal(params[0], before[0])
    assert all((group[0] < 0).ravel())
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": parameters()})
    environments(optimizer, group, grads)
    optimizer.param_groups.pop()
    with pytest.raises(RuntimeError, match="replaced, added or removed"):
        optimizer.step()


@makers
def test_a_parameter_that_is_cast_between_environments(make: Any) -> None:
    params = parameters()
    optimizer = make(params)
    for dtype in (torch.bfloat16, torch.float64):
        environments(optimizer, params, random_grads(params))
        params[1].data = params[1].data.to(dtype)
        message = f"parameter 1 .* stay float32 .* got {str(dtype)[6:]}"
        for call in (optimizer.environment().__enter__, optimizer.step):
            with pytest.raises(RuntimeError, match=message):
                call()
        params[1].data = params[1].data.float()
        optimizer.zero_grad()
    environments(optimizer, params, random_grads(params))
    optimizer.step()


@makers
@pytest.mark.parametrize("back", [False, True])
def test_a_model_that_is_cast_between_environments(make: Any, back: bool) -> None:
    """It is cast as a whole, and the step is refused, also after a cast there and back."""
    model = nn.Linear(3, 2)
    params = list(model.parameters())
    optimizer = make(params)
    environments(optimizer, params, random_grads(params))
    model.bfloat16()
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    if back:
        model.float()
    before = values(params)
    for call in (optimizer.environment().__enter__, optimizer.step, optimizer.write_grads):
        with pytest.raises(RuntimeError, match=r"param_groups: .* call zero_grad\(\)"):
            call()
    assert_equal(params, before)
    optimizer.zero_grad()
    model.float()
    environments(optimizer, params, random_grads(params))
    optimizer.step()


@makers
def test_requires_grad_is_switched(make: Any) -> None:
    params = parameters()
    optimizer = make(params, tau=0.0)
    for frozen in (0, 2, None):
        for index, param in enumerate(params):
            param.requires_grad_(index != frozen)
        moved = [param for param in params if param.requires_grad]
        before = values(params)
        environments(optimizer, moved, [stack.abs() + 1 for stack in random_grads(moved)])
        optimizer.step()
        for index, (param, old) in enumerate(zip(params, before, strict=True)):
            assert torch.equal(param, old) == (index == frozen)


# ---- a step without gradients ----


@makers
def test_an_optimizer_that_a_batch_does_not_reach(make: Any) -> None:
    params = parameters()
    optimizer = make(params)
    environments(optimizer, params, random_grads(params))
    optimizer.step()
    optimizer.zero_grad()
    before, state = values(params), optimizer.state_dict()["state"]
    counts = {key: float(value["step"]) for key, value in state.items() if "step" in value}
    with optimizer.environment():
        torch.ones(1, requires_grad=True).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # no environment at all
    optimizer.write_grads()
    assert_equal(params, before)
    state = optimizer.state_dict()["state"]
    assert counts == {key: float(s["step"]) for key, s in state.items() if "step" in s}
    one_backward(params)
    with pytest.raises(RuntimeError, match=r"got 0 and a \.grad from outside .* put each backward"):
        optimizer.step()


@makers
def test_a_scaled_step_that_reaches_nothing(make: Any) -> None:
    mine, others = parameters(), parameters()
    one, other = make(mine), make(others)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for reached in (True, False):
        with one.environment(grad_scaler=scaler), other.environment(grad_scaler=scaler):
            chosen = [*mine, *(others if reached else [])]
            total = sum(param.square().sum() for param in chosen)
            scaler.scale(total).backward()
        before = values(others)
        scaler.step(one)
        scaler.step(other)
        scaler.update()
        assert all(map(torch.equal, before, others)) is not reached


@makers
def test_a_closure_without_an_environment(make: Any) -> None:
    params = parameters()
    optimizer = make(params)
    with pytest.raises(RuntimeError, match="put each backward pass of the closure inside"):
        optimizer.step(lambda: one_backward(params))


# ---- words for small mistakes ----


def test_the_parentheses_are_missing() -> None:
    optimizer: Any = MAKERS["sgd"](parameters())
    with pytest.raises(TypeError, match=r"expected `with optimizer.environment\(\):`, with paren"):
        with optimizer.environment:
            pass
    assert "backward pass inside it" in type(optimizer).environment.__doc__


def test_the_temporal_mask_takes_no_environments() -> None:
    optimizer: Any = am.optim.TemporalAndMaskAdam(parameters(), tau=0.5)
    with pytest.raises(AttributeError, match=r"takes no environments: .* an ordinary loop"):
        optimizer.environment()
    assert not hasattr(optimizer, "environment")
    with pytest.raises(AttributeError, match="no attribute 'enviroment'"):
        _ = optimizer.enviroment


@pytest.mark.parametrize("name", ["AndMaskSGD", "AndMaskAdamW", "TemporalAndMaskAdam"])
def test_a_typo_in_an_option_of_a_group(name: str) -> None:
    group = {"params": parameters(), "taus": 0.2, "lr_scale": 1.0, "initial_lr": 0.1}
    with heard() as messages:
        optimizer = getattr(am.optim, name)([group], tau=0.5, lr=0.1)
    (message,) = messages  # the last two are values of frameworks and schedulers
    assert message == (
        f"param_groups: expected the options of {name}, but got 'taus', which nothing reads; if "
        "'tau' is meant, correct the name"
    )
    assert optimizer.param_groups[0]["tau"] == 0.5
