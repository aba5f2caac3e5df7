"""``max_norm`` and what else changes a step: written gradients, scalers, states and copies."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.utils import clip_grad_norm_

import andmask_ext as am

from ..models import mlp
from .common import (
    assert_equal,
    backward,
    batches,
    environments,
    optim,
    parameters,
    random_grads,
    train_step,
    values,
)
from .test_amp import SCALE, scaled_environments, scaler
from .test_max_norm import INF, assert_close, assert_norm, makers, pair, step_by_hand
from .test_pending import Twice

# ---- gradients that were written ----


@makers
@pytest.mark.parametrize("how", ["write_grads", "read"])
@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_written_gradients_are_clipped_as_they_are(make: Any, how: str, max_norm: float) -> None:
    params, optimizer, others, plain = pair(make, max_norm)
    grads = random_grads(params)
    environments(optimizer, params, grads)
    environments(plain, others, grads)
    for one, chosen in ((optimizer, params), (plain, others)):
        if how == "write_grads":
            one.write_grads()
        for param in chosen:
            param.grad *= 3
        chosen[1].grad = None  # takes no part
    norm = clip_grad_norm_(others, max_norm)
    optimizer.step()
    plain.step()
    assert_norm(optimizer, norm)
    assert_close(params, others, 1e-9)


@makers
def test_all_gradients_set_to_none_after_writing(make: Any) -> None:
    params = parameters()
    optimizer = make(params, max_norm=1.0)
    environments(optimizer, params, random_grads(params))
    before = values(params)
    optimizer.write_grads()
    for param in params:
        param.grad = None
    optimizer.step()
    assert_norm(optimizer, 0.0)
    assert_equal(params, before)


@makers
@pytest.mark.parametrize("how", ["step", "write_grads", "unscale"])
def test_a_grad_scaler(make: Any, how: str) -> None:
    """The norm is that of unscaled gradients; a skipped step leaves the last one."""
    params, optimizer, others, plain = pair(make, 0.1, torch.float32, tau=0.5)
    plain.max_norm = 0.1
    grad_scaler = scaler()
    grads = random_grads(params)
    scaled_environments(optimizer, grad_scaler, params, grads)
    environments(plain, others, grads)
    if how != "step":
        optimizer.write_grads()
        plain.write_grads()
    if how == "unscale":
        grad_scaler.unscale_(optimizer)
    grad_scaler.step(optimizer)
    grad_scaler.update()
    plain.step()
    assert_norm(optimizer, plain.grad_norm)
    assert_equal(params, others)
    assert grad_scaler.get_scale() == SCALE

    norm = optimizer.grad_norm
    grads[0][0, 0, 0] = INF
    scaled_environments(optimizer, grad_scaler, params, grads)
    grad_scaler.step(optimizer)
    grad_scaler.update()
    assert optimizer.grad_norm is norm
    assert_equal(params, others)


@pytest.mark.parametrize("write", [False, True])
def test_an_agreement(write: bool) -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    optimizer = optim.AndMaskSGD(model.parameters(), lr=0.1, tau=0.5, max_norm=INF)
    agreement = am.Agreement(model, optimizer, loss_reduction="sum")
    other = copy.deepcopy(model)
    with agreement():
        model(x).square().sum().backward()
    if write:
        optimizer.write_grads()
    optimizer.step()
    rows = (other(row).square().sum() for row in x)
    am.backward(rows, am.AndMask(0.5), params=other.parameters())
    assert_norm(optimizer, clip_grad_norm_(other.parameters(), INF), 1e-5)


@makers
def test_an_exchange_comes_before_the_norm(make: Any) -> None:
    """Another process that has the same environments changes no mean, but is asked first."""
    params, others = parameters(), parameters()
    grads = random_grads(params)
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param.data)
    optimizer, plain = make(params, tau=0.5, max_norm=0.1), make(others, tau=0.5, max_norm=0.1)
    optimizer._pending.exchange = Twice()
    for one, chosen in ((optimizer, params), (plain, others)):
        environments(one, chosen, grads)
        one.step()
    assert_norm(optimizer, plain.grad_norm)
    assert_equal(params, others)


@pytest.mark.parametrize("write", [False, True])
def test_a_wrapped_optimizer_that_raises_gets_the_same_gradients_again(write: bool) -> None:
    param = nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([param], lr=1.0)
    optimizer = am.optim.EnvironmentWrapper(base, tau=0.0, max_norm=1.0)
    environments(optimizer, [param], [torch.tensor([[3.0, 4.0]])])

    def fail(*_: Any) -> None:
        raise MemoryError("once")

    if write:
        optimizer.write_grads()
    hook = base.register_step_pre_hook(fail)
    for _ in range(2):
        with pytest.raises(MemoryError):
            optimizer.step()
    hook.remove()
    optimizer.step()
    assert_norm(optimizer, 5.0)
    expected = 1 - torch.tensor([3.0, 4.0]) * torch.tensor(1 / (5 + 1e-6))  # clipped once
    assert torch.equal(param.detach(), expected)
    environments(optimizer, [param], [torch.tensor([[0.3, 0.4]])])
    optimizer.step()
    assert_norm(optimizer, 0.5, 1e-6)


# ---- the option ----


@makers
def test_the_option_is_checked_whenever_it_is_set(make: Any) -> None:
    optimizer = make(parameters(), max_norm=np.float32(0.5))
    assert optimizer.max_norm == 0.5
    for value in (2, np.int64(3), torch.tensor(1.5), INF):
        optimizer.max_norm = value
        assert type(optimizer.max_norm) is float
        assert optimizer.max_norm == float(value)
    for error, message, value in [
        (TypeError, "max_norm: expected a number, but got str", "1"),
        (TypeError, "max_norm: expected a number, but got bool", True),
        (TypeError, r"max_norm: expected a number, but got ndarray of shape \(2,\)", np.ones(2)),
        (ValueError, "max_norm: expected a number above 0, but got 0; None does not clip", 0),
        (ValueError, "max_norm: expected a number above 0, but got -1", -1.0),
        (ValueError, "max_norm: expected a number above 0, but got nan", float("nan")),
    ]:
        with pytest.raises(error, match=message):
            optimizer.max_norm = value
        with pytest.raises(error, match=message):
            make(parameters(), max_norm=value)
    assert optimizer.max_norm == INF
    optimizer.max_norm = None
    assert optimizer.max_norm is None


@makers
def test_a_schedule(make: Any) -> None:
    params, optimizer, others, plain = pair(make, 1.0)
    assert optimizer.grad_norm is None
    for max_norm in (1.0, 0.01, None, 0.1):
        optimizer.max_norm = max_norm
        grads = random_grads(params)
        environments(optimizer, params, grads)
        environments(plain, others, grads)
        optimizer.step()
        norm = step_by_hand(plain, others, INF if max_norm is None else max_norm)
        if max_norm is None:
            assert optimizer.grad_norm is None
        else:
            assert_norm(optimizer, norm)
        assert_close(params, others, 1e-9)
        optimizer.zero_grad()


@makers
def test_a_step_without_environments_leaves_the_norm(make: Any) -> None:
    params = parameters()
    optimizer = make(params, max_norm=1.0)
    environments(optimizer, params, random_grads(params))
    optimizer.step()
    norm = optimizer.grad_norm
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.grad_norm is norm


# ---- states and copies ----


@makers
@pytest.mark.parametrize("between", [False, True])
def test_a_resumed_run_has_the_same_bits(make: Any, between: bool) -> None:
    """A state holds no largest norm: the optimizer that loads keeps its own."""
    params = parameters()
    optimizer = make(params, max_norm=0.1)
    environments(optimizer, params, random_grads(params))
    optimizer.step()
    grads = random_grads(params)
    if between:
        with optimizer.environment():
            backward(params, [stack[0] for stack in grads])
    assert "norm" not in str(optimizer.state_dict()["param_groups"])
    others = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(others, max_norm=0.2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.max_norm == 0.2
    assert resumed.grad_norm is None
    resumed.max_norm = 0.1
    for one, chosen in ((optimizer, params), (resumed, others)):
        environments(one, chosen, [stack[1:] for stack in grads])
        one.step()
    assert torch.equal(optimizer.grad_norm, resumed.grad_norm)
    assert_equal(params, others)


@makers
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_clip_alike(make: Any, how: str) -> None:
    model, data = mlp(), batches()
    optimizer = make(model.parameters(), max_norm=0.05)
    train_step(optimizer, model, data)
    optimizer.zero_grad()
    both = (model, optimizer)
    other, copied = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert copied.max_norm == 0.05
    train_step(optimizer, model, data)
    train_step(copied, other, data)
    assert torch.equal(optimizer.grad_norm, copied.grad_norm)
    assert_equal(list(model.parameters()), list(other.parameters()))


@makers
def test_a_pickle_from_before_there_was_max_norm(make: Any) -> None:
    optimizer = make(parameters(), max_norm=1.0)
    state = optimizer.__getstate__()
    del state["_max_norm"]
    old = object.__new__(type(optimizer))
    old.__setstate__(state)
    assert old.max_norm is None
    assert old.grad_norm is None


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_a_state_of_torch_loads(name: str) -> None:
    params = parameters()
    theirs = getattr(torch.optim, name)(params, lr=0.1)
    for param in params:
        param.grad = torch.ones_like(param)
    theirs.step()
    theirs.zero_grad()
    ours = getattr(optim, f"AndMask{name}")(params, lr=0.1, tau=0.0, max_norm=0.5)
    ours.load_state_dict(theirs.state_dict())
    assert ours.max_norm == 0.5
    environments(ours, params, random_grads(params))
    ours.step()
    assert math.isfinite(float(ours.grad_norm))


@makers
@pytest.mark.parametrize("flatten", [False, True])
def test_a_state_goes_through_torch_distributed_checkpoint(make: Any, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = mlp()
    optimizer = make(model.parameters(), max_norm=0.05)
    train_step(optimizer, model, batches())
    optimizer.zero_grad()
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    other = copy.deepcopy(model)
    resumed = make(other.parameters(), max_norm=0.05)
    get_optimizer_state_dict(other, resumed, options=options)  # makes the state of a fresh one
    assert resumed.grad_norm is None
    set_optimizer_state_dict(other, resumed, optim_state_dict=saved, options=options)
    data = batches()
    for one, chosen in ((optimizer, model), (resumed, other)):
        train_step(one, chosen, data)
    assert torch.equal(optimizer.grad_norm, resumed.grad_norm)
    assert_equal(list(model.parameters()), list(other.parameters()))
