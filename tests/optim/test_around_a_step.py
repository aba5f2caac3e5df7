"""What happens around a step: clipping, closures, hooks, schedulers."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import andmask_ext as am

from ..models import mlp
from .common import (
    MAKERS,
    assert_equal,
    backward,
    batches,
    environments,
    losses,
    optim,
    parameters,
    random_grads,
    train_step,
    values,
)
from .test_environment import makers, sgd


@makers
def test_the_version_of_parameters_is_counted_up(make: Any) -> None:
    """Autograd finds out that a saved tensor has changed."""
    param = nn.Parameter(torch.ones(3))
    optimizer = make([param])
    out = (param * param).sum()
    environments(optimizer, [param], [torch.ones(2, 3)])
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@makers
@pytest.mark.parametrize("clip", [0.01, 1e6])
def test_clipping_stands_between_resolve_and_step(make: Any, clip: float) -> None:
    torch.manual_seed(1)
    model, data = mlp(), batches()
    other = mlp()
    other.load_state_dict(model.state_dict())
    inner = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "wrapper": "RMSprop"}
    name = next(key for key, value in MAKERS.items() if value is make)
    kwargs = {"sgd": {"momentum": 0.9}, "adam": {"amsgrad": True}}.get(name, {})
    optimizer = make(model.parameters())
    manual = getattr(torch.optim, inner[name])(other.parameters(), lr=0.1, **kwargs)
    for _ in range(3):
        for x, y in data:
            with optimizer.environment():
                nn.functional.mse_loss(model(x), y).backward()
        optimizer.write_grads()
        optimizer.write_grads()  # again changes nothing
        norm = clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        manual.zero_grad()
        am.backward(losses(other, data), am.AndMask(1.0), other.parameters())
        assert norm == pytest.approx(float(clip_grad_norm_(other.parameters(), clip)), rel=1e-5)
        manual.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@makers
def test_closures(make: Any) -> None:
    model, other = mlp(), mlp()
    other.load_state_dict(model.state_dict())
    optimizer, data = make(model.parameters()), batches()
    calls = []

    def closure() -> float:
        optimizer.zero_grad()
        assert torch.is_grad_enabled()
        total = 0.0
        for x, y in data:
            with optimizer.environment():
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
            total += loss.item()
        calls.append(total)
        return total

    assert optimizer.step(closure) == calls[0]
    train_step(make(other.parameters()), other, data)
    assert_equal(list(model.parameters()), list(other.parameters()))


@makers
def test_step_hooks(make: Any) -> None:
    params = parameters()
    optimizer, seen = make(params), []
    optimizer.register_step_pre_hook(lambda *_: seen.append(("pre", float(params[1].detach()))))
    optimizer.register_step_post_hook(lambda *_: seen.append(("post", float(params[1].detach()))))
    before = float(params[1].detach())
    environments(optimizer, params, [g.abs() for g in random_grads(params)])
    optimizer.step()
    assert seen == [("pre", before), ("post", float(params[1].detach()))]
    assert before != float(params[1].detach())


@makers
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers(make: Any, tensor_lr: bool) -> None:
    schedulers: dict[str, Any] = {
        "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
        "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=4),
        "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    }
    for name, schedule in schedulers.items():
        params = parameters()
        optimizer = make(params)
        if name == "OneCycleLR" and isinstance(optimizer, optim.EnvironmentWrapper):
            continue  # RMSprop has its momentum under another name
        if tensor_lr:
            optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
        scheduler = schedule(optimizer)
        rates = []
        for _ in range(3):
            before = values(params)
            environments(optimizer, params, [g.abs() + 1 for g in random_grads(params)])
            optimizer.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            assert all((a < b).all() for a, b in zip(params, before, strict=True) if rates[-1])
        assert len(set(rates)) > 1, name


def test_the_learning_rate_of_a_scheduler_is_the_one_used() -> None:
    for lr in (0.1, torch.tensor(0.1)):
        param = nn.Parameter(torch.zeros(1))
        optimizer = optim.AndMaskSGD([param], lr=lr, tau=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for expected in (-0.1, -0.15, -0.175):
            environments(optimizer, [param], [torch.ones(2, 1)])
            optimizer.step()
            scheduler.step()
            assert param.item() == pytest.approx(expected)


def test_an_optimizer_is_collected_with_its_moments() -> None:
    """The hooks on the parameters do not keep it."""
    params = parameters()
    optimizer = sgd(params)
    environments(optimizer, params, random_grads(params))
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    backward(params, [g[0] for g in random_grads(params)])  # and they do nothing
    assert all(p.grad is not None for p in params)


def test_what_is_not_finite_reaches_the_parameters() -> None:
    for name, make in MAKERS.items():
        for row in range(2):
            param = nn.Parameter(torch.ones(3))
            optimizer = make([param])
            grads = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])
            grads[row, 1] = float("nan")
            environments(optimizer, [param], [grads])
            optimizer.step()
            assert param.isfinite().tolist() == [True, False, True], name
