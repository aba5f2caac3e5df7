"""After the last environment ``.grad`` is written when it is read. What is done to it counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import andmask_ext as am
from andmask_ext._pending import State
from andmask_ext._pending._unwritten import UnwrittenGrad

from .common import MAKERS, assert_equal, backward, environments, parameters, random_grads, values

makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def clip_by_hand(params: Sequence[Tensor]) -> None:
    for param in params:
        param.grad.view(-1).clamp_(-0.01, 0.01)


def replace(params: Sequence[Tensor]) -> None:
    for param in params:
        param.grad = param.grad.clamp(-0.01, 0.01)


def divide(params: Sequence[Tensor]) -> None:
    for param in params:
        param.grad /= 3


def exclude_one(params: Sequence[Tensor]) -> None:
    params[0].grad = None


CHANGES: dict[str, Callable[[Sequence[Tensor]], object]] = {
    "clip_grad_norm_": lambda params: nn.utils.clip_grad_norm_(params, 0.01),
    "clip_grad_norm_foreach": lambda params: nn.utils.clip_grad_norm_(params, 0.01, foreach=True),
    "clip_grad_value_": lambda params: nn.utils.clip_grad_value_(params, 0.01),
    "clip_grads_with_norm_": lambda params: nn.utils.clip_grads_with_norm_(
        params, 0.01, nn.utils.get_total_norm([p.grad for p in params])
    ),
    "only some": lambda params: nn.utils.clip_grad_norm_(params[1:], 0.01),
    "data": lambda params: [param.grad.data.clamp_(-0.01, 0.01) for param in params],
    "views": clip_by_hand,
    "replaced": replace,
    "in place": divide,
    "excluded": exclude_one,
    "noise": lambda params: [param.grad.add_(0.5) for param in params],
    "zeroed": lambda params: [param.grad.zero_() for param in params],
}


@makers
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_done_to_grad_counts_without_write_grads(make: Any, change: Any) -> None:
    params = parameters()
    others = copy.deepcopy(params)
    optimizer, explicit = make(params, tau=0.5), make(others, tau=0.5)
    for _ in range(2):
        grads = random_grads(params)
        environments(optimizer, params, grads)
        change(params)
        optimizer.step()
        environments(explicit, others, grads)
        explicit.write_grads()
        change(others)
        explicit.step()
        assert_equal(params, others)


@makers
def test_reading_changes_nothing(make: Any) -> None:
    params = parameters()
    others = copy.deepcopy(params)
    optimizer, plain = make(params, tau=0.5), make(others, tau=0.5)
    for _ in range(2):
        grads = random_grads(params)
        for row in range(3):
            with optimizer.environment():
                backward(params, [stack[row] for stack in grads])
            for param, stack in zip(params, grads, strict=True):
                expected = am.AndMask(0.5)(stack[: row + 1])
                torch.testing.assert_close(param.grad * 1, expected)
        optimizer.step()
        environments(plain, others, grads)
        plain.step()
        assert_equal(params, others)
        optimizer.zero_grad()


def test_a_gradient_that_nobody_reads_is_never_written() -> None:
    params = parameters()
    optimizer = MAKERS["adam"](params)
    environments(optimizer, params, random_grads(params))
    stand_ins = [param.grad for param in params]
    assert all(isinstance(grad, UnwrittenGrad) for grad in stand_ins)
    optimizer.step()
    assert all(param.grad is None for param in params)
    with pytest.raises(RuntimeError, match=r"read before step\(\) or zero_grad\(\)"):
        stand_ins[0].norm()


@makers
def test_a_change_between_environments_is_refused(make: Any) -> None:
    params = parameters()
    optimizer = make(params)
    environments(optimizer, params, random_grads(params))
    nn.utils.clip_grad_value_(params, 0.01)
    with pytest.raises(RuntimeError, match="changes after all environments of a step"):
        optimizer.environment().__enter__()
    optimizer.zero_grad()
    environments(optimizer, params, random_grads(params))
    optimizer.step()


@makers
def test_model_zero_grad_loses_no_environments(make: Any) -> None:
    params = parameters()
    others = copy.deepcopy(params)
    optimizer, plain = make(params), make(others)
    grads = random_grads(params)
    for row in range(3):
        with optimizer.environment():
            backward(params, [stack[row] for stack in grads])
        for param in params:
            param.grad = None
    optimizer.step()
    environments(plain, others, grads)
    plain.step()
    assert_equal(params, others)


@makers
def test_a_backward_pass_outside_is_refused(make: Any) -> None:
    params = parameters()
    optimizer = make(params)
    grads = [stack[0] for stack in random_grads(params)]
    with optimizer.environment():
        backward(params[:2], grads[:2])
    with pytest.raises(RuntimeError, match="a backward pass outside of an environment"):
        backward(params[:1], grads[:1])
    optimizer.zero_grad()
    with optimizer.environment():
        backward(params[:2], grads[:2])
    backward(params[2:], grads[2:])  # of a parameter that has no environment
    before = values(params)
    with pytest.raises(RuntimeError, match=r"step: parameter 2 .* from outside"):
        optimizer.step()
    assert_equal(params, before)
    optimizer.zero_grad()
    environments(optimizer, params, random_grads(params))
    optimizer.step()


def test_the_number_of_environments_is_checked_at_reading() -> None:
    params = parameters()
    optimizer = MAKERS["sgd"](params, expected_environments=4)
    environments(optimizer, params, random_grads(params))
    with pytest.raises(RuntimeError, match=r"\.grad: expected 4 environments .* got 3"):
        nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.zero_grad()


def test_a_state_between_environments_brings_the_stand_ins() -> None:
    params = parameters()
    others = copy.deepcopy(params)
    optimizer, resumed = MAKERS["adam"](params), MAKERS["adam"](others)
    environments(optimizer, params, random_grads(params))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for chosen, one in ((params, optimizer), (others, resumed)):
        nn.utils.clip_grad_norm_(chosen, 0.01)
        one.step()
    assert_equal(params, others)


def test_copies_of_parameters_hold_no_stand_in() -> None:
    tensor = torch.ones(3, requires_grad=True)
    optimizer = MAKERS["sgd"]([tensor])
    environments(optimizer, [tensor], [torch.ones(2, 3)])
    assert copy.deepcopy(tensor).grad is None
    assert optimizer._pending.state is State.PENDING


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = MAKERS["sgd"](params)
    grads = random_grads(params)
    environments(optimizer, params, grads)
    norm = nn.utils.clip_grad_norm_(params, 1e9)
    assert norm > 0
    assert all(param.grad.dtype == dtype for param in params)
    for param, stack in zip(params, grads, strict=True):
        torch.testing.assert_close(param.grad, am.AndMask(1.0)(stack))
    optimizer.step()


def test_an_agreement_with_an_optimizer_is_clipped_too() -> None:
    model = nn.Linear(3, 2)
    optimizer = am.optim.AndMaskSGD(model.parameters(), lr=1.0, tau=0.0)
    agreement = am.Agreement(model, optimizer)
    before = values(list(model.parameters()))
    with agreement():
        model(torch.randn(6, 3)).square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    moved = [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]
    torch.testing.assert_close(
        nn.utils.get_total_norm(moved), torch.tensor(1e-3), rtol=1e-3, atol=0
    )
