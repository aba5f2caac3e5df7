"""A step that raises half-way can be tried again or dropped. Nothing leaks into the next one."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

import andmask_ext as am
from andmask_ext._pending import Group, Observer, State

from .common import MAKERS, assert_equal, environments, parameters, random_grads, values

makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


class RaisesOnce(Observer):
    raised = False

    def end(self, groups: Sequence[Group]) -> None:
        if not self.raised:
            self.raised = True
            raise MemoryError("once")


def of_batch(model: nn.Module, agreement: am.Agreement, x: torch.Tensor) -> None:
    with agreement():
        model(x).sin().mean().backward()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("fault", ["observer", "exchange", "grad"])
def test_environments_of_a_failed_agreement_do_not_vote_in_the_next(fault: str, keep: bool) -> None:
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(5, 3)
    agreement = am.Agreement(model, am.AndMask(0.5), keep_moments=keep)
    pending = agreement._pending
    if fault == "observer":
        pending.add_observer(RaisesOnce())
    elif fault == "exchange":
        pending.exchange = lambda groups: 1 // 0
    else:
        model.weight.grad = torch.sparse_coo_tensor(size=(2, 3), check_invariants=True)
    with pytest.raises((MemoryError, ZeroDivisionError, RuntimeError)):
        of_batch(model, agreement, x)
    assert pending.state is State.IDLE
    pending.exchange = None
    model.zero_grad()
    of_batch(model, agreement, y)
    found = model.weight.grad
    model.zero_grad()
    of_batch(model, am.Agreement(model, am.AndMask(0.5)), y)
    assert torch.equal(found, model.weight.grad)


@makers
@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("fault", ["observer", "rule"])
def test_a_scaled_step_may_be_tried_again(make: Any, write: bool, fault: str) -> None:
    params, others = parameters(), parameters()
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param.data)
    grads = random_grads(params)
    for tried, chosen in ((True, params), (False, others)):
        optimizer, scaler = make(chosen, tau=0.5), GradScaler("cpu", init_scale=1024.0)
        for row in range(3):
            with optimizer.environment(grad_scaler=scaler):
                total = sum((p * g[row]).sum() for p, g in zip(chosen, grads, strict=True))
                scaler.scale(total).backward()
        if write:
            optimizer.write_grads()
        if tried and fault == "observer":
            optimizer._pending.add_observer(RaisesOnce())
            with pytest.raises(MemoryError):
                scaler.step(optimizer)
        elif tried:
            group = optimizer.param_groups[0]
            before = group["rule"]
            group.update(rule=am.rules.Mean(), tau=0.5)
            with pytest.raises(ValueError, match="to None in the param group"):
                scaler.step(optimizer)
            assert not hasattr(optimizer, "found_inf")
            group["rule"] = before
            if isinstance(optimizer, am.optim.EnvironmentWrapper):
                del group["tau"]
        scaler.step(optimizer)
    assert_equal(params, others)


def test_a_wrapped_optimizer_that_raises_gets_the_same_gradients_again() -> None:
    param = nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([param], lr=1.0)
    optimizer, scaler = am.optim.EnvironmentWrapper(base, tau=0.0), GradScaler("cpu", 1024.0)
    with optimizer.environment(grad_scaler=scaler):
        scaler.scale((param * torch.tensor([0.25, 0.5])).sum()).backward()

    def fail(*_: Any) -> None:
        raise MemoryError("once")

    hook = base.register_step_pre_hook(fail)
    with pytest.raises(MemoryError):
        scaler.step(optimizer)
    hook.remove()
    scaler.step(optimizer)
    assert param.tolist() == [0.75, 0.5]


def test_a_group_of_a_wrapped_optimizer_may_have_its_own_tau() -> None:
    param = nn.Parameter(torch.ones(2))
    optimizer = am.optim.EnvironmentWrapper(torch.optim.SGD([param], lr=1.0), tau=0.0)
    optimizer.param_groups[0]["tau"] = 1.0
    environments(optimizer, [param], [torch.tensor([[1.0, 1.0], [1.0, -0.5]])])
    optimizer.step()
    assert param.tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"tau: .* 1.5"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "tau": 1.5})
    assert len(optimizer.param_groups) == 1


def test_the_rule_of_a_state_replaces_tau_and_the_other_way_round() -> None:
    params = parameters()
    wrapped = am.optim.EnvironmentWrapper(torch.optim.Adam(params), am.rules.Mean())
    masked = am.optim.AndMaskAdam(params, tau=0.7)
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in (wrapped, masked)]
    masked.load_state_dict(states[0])
    assert masked._rules()[0][1] == am.rules.Mean()
    wrapped.load_state_dict(states[1])
    assert wrapped._rules()[0][1] == am.AndMask(0.7)
    for optimizer in (wrapped, masked):
        optimizer.zero_grad()
        environments(optimizer, params, random_grads(params))
        optimizer.step()


@makers
def test_an_exchange_does_not_change_what_this_process_expects(make: Any) -> None:
    params = parameters()
    optimizer = make(params, expected_environments=3)
    optimizer._pending.exchange = lambda groups: 2 * groups[0].moments.count
    environments(optimizer, params, random_grads(params))
    optimizer.write_grads()
    optimizer.step()
    environments(optimizer, params, random_grads(params))
    optimizer._pending.add_observer(RaisesOnce())
    with pytest.raises(MemoryError):
        optimizer.step()
    with pytest.raises(RuntimeError, match="exchanged with those of other processes"):
        optimizer.environment().__enter__()
    optimizer.step()


def test_detaching_releases_the_optimizer_and_names_what_is_missing() -> None:
    model = nn.Linear(2, 1)
    optimizer = am.optim.AndMaskSGD(model.parameters(), lr=0.1, tau=0.5)
    agreement = am.Agreement(model, optimizer)
    of_batch(model, agreement, torch.randn(3, 2))
    optimizer.step()
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": [model.weight]})
    with pytest.raises(RuntimeError, match=r"bias is no parameter of the optimizer any more"):
        of_batch(model, agreement, torch.randn(3, 2))
    agreement.detach()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    monitored = am.Agreement(model, am.AndMask(0.5))
    monitor = am.metrics.Monitor(monitored)
    of_batch(model, monitored, torch.randn(3, 2))
    state = monitor.state_dict()
    monitored.detach()
    with pytest.raises(ValueError, match="state: expected records of 0 parameters"):
        monitor.load_state_dict(state)
    assert values([model.weight])
