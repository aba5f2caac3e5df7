"""Copies and pickles of an Agreement belong to the copies of its model and optimizer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import andmask_ext as am

from ..models import curved, mlp
from .exact_loop import RULE
from .layers import rand

Copy = Callable[[Any], Any]


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Copy] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "file": through_a_file,
    "twice": lambda value: copy.deepcopy(pickle.loads(pickle.dumps(value))),
}
copies = pytest.mark.parametrize("how", COPIES)


class Trainer:
    """Holds what belongs together; the Agreement comes first."""

    def __init__(self, agreement: am.Agreement, model: nn.Module, optimizer: Any) -> None:
        self.agreement, self.model, self.optimizer = agreement, model, optimizer

    def step(self, x: Tensor) -> None:
        with self.agreement(2):
            curved(self.model, x).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def trainer(kind: str) -> Trainer:
    model = mlp().double()
    if kind == "rule":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return Trainer(am.Agreement(model, RULE, keep_moments=True), model, optimizer)
    if kind == "frozen":
        model[0].requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Trainer(am.Agreement(model, RULE), model, optimizer)
    if kind == "some parameters":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Trainer(am.Agreement(model, RULE, model[0].parameters()), model, optimizer)
    optimizer = am.optim.AndMaskAdam(model.parameters(), lr=0.1, tau=0.6)
    return Trainer(am.Agreement(model, optimizer), model, optimizer)


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert a is not b
        assert torch.equal(a, b)


@copies
@pytest.mark.parametrize("kind", ["optimizer", "rule", "frozen", "some parameters"])
def test_training_goes_on_with_copies(kind: str, how: str) -> None:
    first, x = trainer(kind), rand(6, 4)
    first.step(x)
    before = copy.deepcopy(first.model)
    second = COPIES[how](first)
    first.step(x)
    assert_equal(second.model, before)
    second.step(x)
    assert_equal(second.model, first.model)
    assert [line.name for line in second.agreement.report()] == [
        line.name for line in first.agreement.report()
    ]


class Holder(nn.Module):
    """A model that holds its own Agreement, as modules of Lightning do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.agreement = am.Agreement(self, RULE)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@copies
def test_a_model_that_holds_its_agreement(how: str) -> None:
    model, x = Holder().double(), rand(6, 4)
    other = COPIES[how](model)
    for one in (model, other):
        with one.agreement():
            curved(one, x).backward()
    assert torch.equal(model.net.weight.grad, other.net.weight.grad)
    assert model.net.weight.grad is not other.net.weight.grad


def test_environments_of_an_optimizer_are_copied_with_it() -> None:
    first, x = trainer("optimizer"), rand(6, 4)
    with first.agreement():
        curved(first.model, x).backward()
    second = copy.deepcopy(first)
    for one in (first, second):
        with one.agreement():
            curved(one.model, x * 2).backward()
        one.optimizer.step()
    assert_equal(first.model, second.model)


def test_what_cannot_be_copied_is_refused() -> None:
    model = nn.Linear(4, 3).double()
    agreement, x = am.Agreement(model, RULE), rand(6, 4)
    with agreement():
        curved(model, x).backward()
        with pytest.raises(
            RuntimeError, match="copy: expected an Agreement outside of its context"
        ):
            copy.deepcopy(agreement)
    with agreement(write_grads=False):
        curved(model, x).backward()
    with pytest.raises(RuntimeError, match=r"copy: 6 environments wait .*write_grads=False"):
        pickle.dumps(agreement)
    with agreement():
        curved(model, x).backward()
    assert copy.deepcopy(agreement)._setup.model is not model
    agreement.detach()
    with pytest.raises(RuntimeError, match=r"copy: expected to be used before detach"):
        copy.deepcopy(agreement)


def test_a_copy_has_no_other_attributes() -> None:
    other = copy.deepcopy(am.Agreement(nn.Linear(4, 3), RULE))
    with pytest.raises(AttributeError, match="'Agreement' object has no attribute 'nothing'"):
        other.nothing  # noqa: B018
    assert repr(other).startswith("<andmask_ext")
