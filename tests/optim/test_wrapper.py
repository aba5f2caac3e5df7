"""EnvironmentWrapper around torch's optimizers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import andmask_ext as am

from ..models import mlp
from .common import (
    assert_equal,
    batches,
    environments,
    losses,
    optim,
    parameters,
    random_grads,
    train_step,
)

INNER: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}
inners = pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
RULES = [
    am.AndMask(0.6, True),
    am.rules.Mean(),
    am.rules.GeometricMean(0.5),
    am.rules.SandMask(0.3, 2.0),
    am.rules.MaskedAverage(0.7),
    am.rules.AgreementSum(),
]


@inners
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_equals_backward_and_step(inner: Any, rule: am.rules.Rule) -> None:
    one, other = mlp(), mlp()
    other.load_state_dict(one.state_dict())
    wrapped = optim.EnvironmentWrapper(inner(one.parameters()), rule)
    plain = inner(other.parameters())
    for _ in range(4):
        data = batches()
        train_step(wrapped, one, data)
        plain.zero_grad()
        am.backward(losses(other, data), rule, other.parameters())
        plain.step()
        assert_equal(list(one.parameters()), list(other.parameters()))


@inners
@pytest.mark.parametrize("on_outer", [True, False])
def test_schedulers_on_either(inner: Any, on_outer: bool) -> None:
    params = parameters()
    base = inner(params)
    wrapped = optim.EnvironmentWrapper(base, tau=1.0)
    chosen = wrapped if on_outer else base
    scheduler = torch.optim.lr_scheduler.ExponentialLR(chosen, 0.5)
    for lr in (0.1, 0.05, 0.025):
        assert base.param_groups[0]["lr"] == wrapped.param_groups[0]["lr"] == pytest.approx(lr)
        environments(wrapped, params, random_grads(params))
        wrapped.step()
        scheduler.step()
    before = [p.detach().clone() for p in params]
    for group in chosen.param_groups:
        group["lr"] = 0.0
    environments(wrapped, params, random_grads(params))
    wrapped.step()
    assert_equal(params, before)


@inners
@pytest.mark.parametrize("how", ["outer", "inner", "deepcopy", "pickle", "file"])
def test_state_goes_on_to_the_same_bits(inner: Any, how: str, tmp_path: Path) -> None:
    params = parameters()
    straight = optim.EnvironmentWrapper(inner(params), am.AndMask(0.6))

    def step(optimizer: Any, chosen: list[nn.Parameter], grads: list[torch.Tensor]) -> None:
        environments(optimizer, chosen, grads)
        optimizer.step()

    for _ in range(2):
        step(straight, params, random_grads(params))
    straight.zero_grad()
    if how in ("deepcopy", "pickle"):
        pair = (params, straight)
        others, resumed = (
            copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
        )
    else:
        others = [nn.Parameter(p.detach().clone()) for p in params]
        resumed = optim.EnvironmentWrapper(inner(others), am.AndMask(0.6))
        if how == "inner":  # of the wrapped optimizer alone, to the wrapped optimizer alone
            resumed.optimizer.load_state_dict(copy.deepcopy(straight.optimizer.state_dict()))
        elif how == "outer":
            resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
        else:
            torch.save(straight.state_dict(), tmp_path / "state.pt")
            resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.param_groups is resumed.optimizer.param_groups or how == "inner"
    for _ in range(2):
        grads = random_grads(params)
        step(straight, params, grads)
        step(resumed, others, grads)
        assert_equal(params, others)
    assert resumed.param_groups is resumed.optimizer.param_groups
    assert resumed.state is resumed.optimizer.state
    scheduler = torch.optim.lr_scheduler.ExponentialLR(resumed, 0.5)
    step(resumed, others, random_grads(others))
    scheduler.step()
    assert resumed.optimizer.param_groups[0]["lr"] == 0.05


def test_a_plain_state_of_the_wrapped_class_loads() -> None:
    params = parameters()
    plain = torch.optim.Adam(params, lr=0.1)
    for param in params:
        param.grad = torch.randn_like(param)
    plain.step()
    others = [nn.Parameter(p.detach().clone()) for p in params]
    wrapped = optim.EnvironmentWrapper(torch.optim.Adam(others, lr=0.5), am.rules.Mean())
    wrapped.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert wrapped.param_groups[0]["rule"] == am.rules.Mean()
    assert wrapped.param_groups[0]["lr"] == 0.1
    grads = random_grads(params, 2)
    for param, stack in zip(params, grads, strict=True):
        param.grad = stack.mean(0)
    plain.step()
    environments(wrapped, others, grads)
    wrapped.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


def test_groups_share_and_may_have_their_own_rule() -> None:
    params = parameters()
    base = torch.optim.SGD(
        [{"params": params[:1]}, {"params": params[1:2], "rule": am.rules.Mean()}], 0.1
    )
    wrapped = optim.EnvironmentWrapper(base, am.AndMask(0.5))
    wrapped.add_param_group({"params": params[2:]})
    assert len(base.param_groups) == 3
    rules = [group["rule"] for group in wrapped.param_groups]
    assert rules == [am.AndMask(0.5), am.rules.Mean(), am.AndMask(0.5)]
    grads = random_grads(params, 4)
    environments(wrapped, params, grads)
    wrapped.write_grads()
    for param, rule, stack in zip(params, rules, grads, strict=True):
        torch.testing.assert_close(param.grad, rule(stack))


@pytest.mark.parametrize("option", [{"zeros": "abstain"}, {"rescale": True}])
def test_options_of_a_mask_beside_a_rule_are_not_passed_over(option: dict[str, Any]) -> None:
    groups = [{"params": parameters(), **option}]
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}: .* but got {name}=.* and rule=AndMask"):
        optim.EnvironmentWrapper(torch.optim.SGD(groups, lr=0.1), tau=0.5)
    groups = [{"params": parameters(), **option, "tau": 0.5}]
    wrapper = optim.EnvironmentWrapper(torch.optim.SGD(groups, lr=0.1), am.rules.Mean())
    assert wrapper._rules()[0][1] == am.AndMask(0.5, **option)


def test_step_hooks_of_both_run() -> None:
    params, seen = parameters(), []
    base = torch.optim.SGD(params, lr=0.1)
    wrapped = optim.EnvironmentWrapper(base, tau=1.0)
    base.register_step_post_hook(lambda *_: seen.append("inner"))
    wrapped.register_step_post_hook(lambda *_: seen.append("outer"))
    environments(wrapped, params, random_grads(params))
    wrapped.step()
    assert seen == ["inner", "outer"]


def test_updates_are_left_in_grad() -> None:
    """As after any backward pass: to be logged, say. The next environment clears them."""
    params = parameters()
    wrapped = optim.EnvironmentWrapper(torch.optim.SGD(params, lr=0.1), am.rules.Mean())
    for _ in range(2):
        grads = random_grads(params)
        environments(wrapped, params, grads)
        wrapped.step()
        for param, stack in zip(params, grads, strict=True):
            torch.testing.assert_close(param.grad, stack.mean(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "optimizer: expected a torch.optim.Optimizer, but got int"),
        ((torch.optim.SGD,), "optimizer: expected a torch.optim.Optimizer, but got type"),
        ((torch.optim.SGD(parameters(), 0.1), 0.5), "rule: .* but got float"),
        ((torch.optim.SGD(parameters(), 0.1), am.AndMask), "rule: .* but got AndMask"),
        ((torch.optim.SGD(parameters(), 0.1), am.rules.Median()), "rule: .* environments at once"),
    ],
)
def test_mistakes(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        optim.EnvironmentWrapper(*arguments)


def test_a_group_with_a_level_of_its_own_keeps_the_other_options() -> None:
    first, second, third = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    groups: list[dict[str, Any]] = [
        {"params": [first]},
        {"params": [second], "significance": 0.2},
        {"params": [third], "tau": 0.5, "zeros": "count", "rescale": False},
    ]
    optimizer = am.optim.EnvironmentWrapper(
        torch.optim.SGD(groups, lr=1.0), fdr=0.3, zeros="abstain", rescale=True
    )
    assert [rule for _, rule in optimizer._rules()] == [
        am.AndMask(fdr=0.3, rescale=True, zeros="abstain"),
        am.AndMask(significance=0.2, rescale=True, zeros="abstain"),
        am.AndMask(0.5),
    ]
