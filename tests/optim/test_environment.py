"""Environments: what a training loop may do with them, and what it is told when it may not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    unanimous,
    values,
)

makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
RULES = [
    am.rules.Mean(),
    am.AndMask(0.6, True),
    am.rules.GeometricMean(0.5),
    am.rules.SandMask(0.3, 2.0, False),
]


def sgd(params: Any, **options: Any) -> Any:
    return optim.AndMaskSGD(params, lr=0.1, **unanimous(options))


# ---- what a step is made of ----


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_equals_backward_with_the_same_rule(rule: am.rules.Rule) -> None:
    torch.manual_seed(3)
    model, data = mlp(), batches()
    am.backward(losses(model, data), rule, model.parameters())
    expected = [p.detach() - 0.1 * p.grad for p in model.parameters()]
    model.zero_grad()
    train_step(sgd(model.parameters(), rule=rule), model, data)
    for param, other in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.detach(), other)


@makers
def test_gradients_are_freed_as_they_come(make: Any) -> None:
    """A large gradient goes into the sums before the backward pass is over."""
    large, small = nn.Parameter(torch.ones(300_000)), nn.Parameter(torch.ones(()))
    there: list[bool] = []
    small.register_hook(lambda grad: there.append(large.grad is not None))
    (large * small.sin()).sum().backward()
    assert there == [True]  # without an environment it is still there when that of `small` comes
    large.grad = small.grad = None
    optimizer = make([small, large])
    for _ in range(2):
        with optimizer.environment():
            (large * small.sin()).sum().backward()
            assert large.grad is None
    assert there == [True, False, False]
    optimizer.step()


@makers
def test_groups_have_their_own_options(make: Any) -> None:
    """One group is masked, one is not, one has another learning rate."""
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    mean = am.rules.Mean()
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "rule": mean},
        {"params": params[2:], "rule": am.AndMask(0.3), "lr": 0.0},
    ]
    optimizer = make(groups)
    assert optimizer.param_groups[1]["rule"] is mean
    grads = torch.tensor([[1.0, -1.0], [1.0, 2.0]])
    environments(optimizer, params, [grads] * 3)
    optimizer.write_grads()
    assert [p.grad.tolist() for p in params] == [[1.0, 0.0], [1.0, 0.5], [1.0, 0.0]]
    optimizer.step()
    assert params[0][0] != 0
    assert params[0][1] == 0
    assert (params[1] != 0).all()
    assert (params[2] == 0).all()


def test_groups_have_their_own_tau_and_rescale() -> None:
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = sgd(
        [
            {"params": params[:1], "tau": 0.0},
            {"params": params[1:2], "tau": 1.0},
            {"params": params[2:], "tau": 1.0, "rescale": True},
        ]
    )
    environments(optimizer, params, [torch.tensor([[1.0, -1.0], [1.0, 2.0]])] * 3)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    for param, expected in zip(params, ([-1.0, -0.5], [-0.1, 0.0], [-0.2, 0.0]), strict=True):
        torch.testing.assert_close(param.data, torch.tensor(expected))


@makers
def test_a_group_may_be_added_between_steps(make: Any) -> None:
    first, second = parameters()[:1], parameters()[2:]
    optimizer = make(first)
    environments(optimizer, first, random_grads(first))
    with pytest.raises(RuntimeError, match="expected no environments since the last step"):
        optimizer.add_param_group({"params": second})
    optimizer.step()
    optimizer.add_param_group({"params": second, "rule": am.rules.Mean()})
    before = values(second)
    both = [*first, *second]
    environments(optimizer, both, random_grads(both))
    optimizer.step()
    assert not torch.equal(second[0].detach(), before[0])


@makers
def test_frozen_unfrozen_and_unused_parameters(make: Any) -> None:
    used, frozen, unused = (nn.Parameter(torch.ones(3)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = make([{"params": [used, frozen]}, {"params": [unused]}])

    def step() -> None:
        for _ in range(2):
            with optimizer.environment():
                (used + frozen).sum().backward()
                assert used.grad is None  # taken already: of those unfrozen later too
                assert frozen.grad is None
        optimizer.write_grads()
        assert unused.grad is None
        optimizer.step()

    step()
    assert frozen.tolist() == [1.0] * 3
    assert unused.tolist() == [1.0] * 3
    assert used[0] < 1
    frozen.requires_grad_(True)
    step()
    assert frozen[0] < 1
    used.requires_grad_(False)
    before = used.tolist()
    step()
    assert used.tolist() == before


@makers
def test_a_parameter_that_not_every_environment_reaches(make: Any) -> None:
    always, sometimes = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    for first in (True, False):
        optimizer = make([{"params": [always, sometimes], "rule": am.AndMask(0.5)}])
        for with_both in (first, not first):
            with optimizer.environment():
                (always * 2 + (sometimes * 4 if with_both else 0)).sum().backward()
        optimizer.write_grads()
        assert sometimes.grad.item() == 2.0
        optimizer.zero_grad()


@makers
def test_weights_multiply_the_losses(make: Any) -> None:
    params, others = parameters(torch.float64), parameters(torch.float64)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    grads = random_grads(params, 2)
    one, other = make(params, rule=am.rules.Mean()), make(others, rule=am.rules.Mean())
    for row, weight in enumerate((0.5, 1.5)):
        with one.environment(weight=weight):
            backward(params, [g[row] for g in grads])
        with other.environment():
            backward(others, [g[row] for g in grads], weight)
    one.step()
    other.step()
    assert_equal(params, others)


@pytest.mark.parametrize("micro_batches", [3, None])
@makers
def test_micro_batches_add_up_before_they_vote(make: Any, micro_batches: int | None) -> None:
    params, others = parameters(), parameters()
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    one, other = make(params), make(others)
    parts = [random_grads(params) for _ in range(2)]
    for row in range(2):
        with one.environment(micro_batches=micro_batches):
            for part in range(3):
                backward(params, [g[part] for g in parts[row]])
        with other.environment():
            backward(others, [g[0] + g[1] + g[2] for g in parts[row]])
    one.step()
    other.step()
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b)


@makers
def test_tied_weights_are_summed_before_the_vote(make: Any) -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = make([weight])
    for a, b in [(3.0, -1.0), (-1.0, 2.0)]:  # sums 2 and 1 agree, the parts do not
        with optimizer.environment():
            (weight * a + weight * b).sum().backward()
    optimizer.write_grads()
    assert weight.grad.item() == 1.5


def test_compiled_model() -> None:
    torch._dynamo.reset()
    torch.manual_seed(1)
    model, data = mlp(), batches(3)
    am.backward(losses(model, data), am.AndMask(0.5), model.parameters())
    expected = [p.detach() - 0.1 * p.grad for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    train_step(sgd(model.parameters(), tau=0.5), compiled, data)
    for param, other in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.detach(), other)


def test_checkpointing() -> None:
    torch.manual_seed(1)
    data = batches(3)
    results = []
    for reentrant in (None, False, True):
        torch.manual_seed(2)
        model = mlp()
        optimizer = sgd(model.parameters(), tau=0.5)
        for x, y in data:
            with optimizer.environment(micro_batches=None if reentrant else 1):
                inputs = x.clone().requires_grad_()
                out = model(inputs) if reentrant is None else inputs
                for _ in range(0 if reentrant is None else 1):
                    out = checkpoint(model, inputs, use_reentrant=reentrant)
                nn.functional.mse_loss(out, y).backward()
        optimizer.step()
        results.append(values(model.parameters()))
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


def test_reentrant_checkpointing_twice_over_needs_micro_batches_none() -> None:
    model = mlp()

    def loss() -> Tensor:
        x = torch.randn(8, 4, requires_grad=True)
        return sum(checkpoint(model, x, use_reentrant=True).sum() for _ in range(2))

    optimizer = sgd(model.parameters())
    with pytest.raises(RuntimeError, match=r"one more; .*micro_batches=.*reentrant checkpointing"):
        with optimizer.environment():
            loss().backward()
    optimizer.zero_grad()
    with optimizer.environment(micro_batches=None):
        loss().backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_have_float32_state(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    for name in ("sgd", "adam", "adamw"):
        optimizer = MAKERS[name](params)
        environments(optimizer, params, random_grads(params))
        optimizer.step()
        state = [t for p in params for k, t in optimizer.state[p].items() if k != "step"]
        assert {t.dtype for t in state} == {torch.float32}
        assert all(p.dtype == dtype and p.isfinite().all() for p in params)


@makers
def test_two_optimizers_on_one_model(make: Any) -> None:
    """On halves of it, in environments of their own or in common; or by turns on all of it."""
    data = batches(3)
    torch.manual_seed(1)
    one, other, both = mlp(), mlp(), mlp()
    other.load_state_dict(one.state_dict())
    both.load_state_dict(one.state_dict())
    train_step(make(one.parameters()), one, data)
    halves = [make(other[0].parameters()), make(other[2].parameters())]
    for x, y in data:
        with halves[0].environment(), halves[1].environment():
            nn.functional.mse_loss(other(x), y).backward()
    for half in halves:
        half.step()
    assert_equal(list(one.parameters()), list(other.parameters()))
    first, second = make(both.parameters()), make(both.parameters(), tau=0.0)
    train_step(first, both, data)
    assert_equal(list(one.parameters()), list(both.parameters()))
    both.zero_grad()
    train_step(second, both, data)
    both.zero_grad()
    train_step(first, both, data)
