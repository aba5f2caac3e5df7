"""The step that optimizers and Agreement own: its states, its door for observers, the exchange."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import andmask_ext as am
from andmask_ext._pending import Group, Observer, State

from .common import MAKERS, backward, environments, parameters, random_grads, values

makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


class Recorder(Observer):
    """Writes down what it is shown."""

    def __init__(self) -> None:
        self.counts: list[list[int]] = []

    def end(self, groups: Sequence[Group]) -> None:
        self.counts.append([group.moments.count for group in groups])


class Twice:
    """An exchange with one other process, which has the same environments."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, groups: Sequence[Group]) -> int:
        self.calls += 1
        for _, moments, _ in groups:
            for total, votes in zip(moments.sum, moments.votes, strict=True):
                if total is not None:
                    total += total.clone()
                    votes += votes.clone()
        return 2 * groups[0].moments.count


@makers
def test_states_of_a_step(make: Any) -> None:
    params = parameters()
    optimizer = make(params)
    pending, grads = optimizer._pending, random_grads(params)
    assert pending.state is State.IDLE
    with optimizer.environment():
        assert pending.state is State.OPEN
        backward(params, [stack[0] for stack in grads])
    assert (pending.state, pending.environments) == (State.PENDING, 1)
    optimizer.write_grads()
    assert pending.state is State.WRITTEN
    optimizer.step()
    assert (pending.state, pending.environments) == (State.IDLE, 0)
    with pytest.raises(ValueError, match="mine"), optimizer.environment():
        raise ValueError("mine")
    assert pending.state is State.BROKEN
    optimizer.zero_grad()
    assert pending.state is State.IDLE


def test_an_agreement_with_a_rule_owns_a_step_and_one_with_an_optimizer_shares_it() -> None:
    model = nn.Linear(3, 2)
    optimizer = am.optim.AndMaskSGD(model.parameters(), lr=0.1, tau=0.5)
    assert am.Agreement(model, optimizer)._pending is optimizer._pending
    agreement = am.Agreement(model, am.AndMask(0.5))
    pending = agreement._pending
    for expected in (State.PENDING, State.IDLE):
        with agreement(write_grads=expected is State.IDLE):
            assert pending.state is State.OPEN
            model(torch.randn(4, 3)).sin().mean().backward()
        assert pending.state is expected
    with pytest.raises(ValueError, match="mine"), agreement():
        raise ValueError("mine")
    assert pending.state is State.IDLE


@makers
@pytest.mark.parametrize("write", [False, True])
def test_an_exchange_comes_once_before_observers_and_sets_the_number_of_environments(
    make: Any, write: bool
) -> None:
    params, others = parameters(), parameters()
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param.data)
    optimizer, plain = make(params, tau=0.6), make(others, tau=0.6)
    exchange, recorder = Twice(), Recorder()
    optimizer._pending.exchange = exchange
    optimizer._pending.add_observer(recorder)
    for _ in range(2):
        grads = random_grads(params)
        environments(optimizer, params, grads)
        environments(plain, others, [torch.cat([stack, stack]) for stack in grads])
        if write:
            optimizer.write_grads()
            optimizer.write_grads()
        optimizer.step()
        plain.step()
    assert exchange.calls == 2
    assert recorder.counts == [[6], [6]]
    for found, expected in zip(values(params), values(others), strict=True):
        torch.testing.assert_close(found, expected)
    optimizer._pending.remove_observer(recorder)
    environments(optimizer, params, grads)
    optimizer.step()
    assert len(recorder.counts) == 2


def test_an_exchange_at_the_end_of_an_agreement() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    twice = torch.cat([x, x])
    grads = []
    for inputs, exchange in ((x, Twice()), (twice, None)):
        model.zero_grad()
        agreement = am.Agreement(model, am.AndMask(0.6, rescale=True))
        agreement._pending.exchange = exchange
        recorder = Recorder()
        agreement._pending.add_observer(recorder)
        with agreement():
            model(inputs).sin().mean().backward()
        assert recorder.counts == [[8]]
        grads.append(model.weight.grad)
    torch.testing.assert_close(*grads)


@makers
def test_an_exchange_that_raises_breaks_the_step(make: Any) -> None:
    params = parameters()
    optimizer = make(params)

    def fail(groups: Sequence[Group]) -> int:
        raise ConnectionError("the other process is gone")

    optimizer._pending.exchange = fail
    environments(optimizer, params, random_grads(params))
    with pytest.raises(ConnectionError):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"raised .* zero_grad\(\)"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer._pending.exchange = None
    environments(optimizer, params, random_grads(params))
    optimizer.step()
