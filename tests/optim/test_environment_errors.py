"""What an optimizer refuses, in words that help, and how to go on afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import andmask_ext as am

from .common import (
    MAKERS,
    assert_equal,
    backward,
    environments,
    optim,
    parameters,
    random_grads,
    unanimous,
    values,
)

makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def works(optimizer: Any, params: list[nn.Parameter]) -> None:
    """An ordinary step goes through, and is what it would be on a fresh optimizer."""
    before, grads = values(params), random_grads(params)
    environments(optimizer, params, grads)
    optimizer.write_grads()
    for param, grad in zip(params, grads, strict=True):
        assert torch.equal(param.grad, am.AndMask(1.0)(grad))
    optimizer.step()
    assert not all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@makers
def test_step_without_an_environment(make: Any) -> None:
    params = parameters()
    optimizer = make(params)
    with pytest.raises(RuntimeError, match=r"step: expected at least one environment .* got 0"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="write_grads: expected at least one environment"):
        optimizer.write_grads()
    backward(params, [g[0] for g in random_grads(params)])  # as in a loop for another optimizer
    with pytest.raises(RuntimeError, match="put each backward pass inside"):
        optimizer.step()
    optimizer.zero_grad()
    works(optimizer, params)
    with pytest.raises(RuntimeError, match="at least one environment"):
        optimizer.step()  # a second step needs environments of its own


@makers
def test_nothing_but_backward_passes_inside_an_environment(make: Any) -> None:
    params = parameters()
    optimizer = make(params)
    state = optimizer.state_dict()
    calls = {
        "inside another": lambda: optimizer.environment().__enter__(),
        "step: expected to be called outside": optimizer.step,
        "write_grads: expected to be called outside": optimizer.write_grads,
        "load_state_dict: expected to be called outside": lambda: optimizer.load_state_dict(state),
    }
    for message, call in calls.items():
        with optimizer.environment():
            with pytest.raises(RuntimeError, match=message):
                call()
            backward(params, [g[0] for g in random_grads(params)])
        with optimizer.environment():
            backward(params, [g[1] for g in random_grads(params)])
        optimizer.step()
    works(optimizer, params)


@makers
@pytest.mark.parametrize("after_backward", [False, True])
def test_an_exception_inside_leaves_nothing_half_done(make: Any, after_backward: bool) -> None:
    params = parameters()
    optimizer = make(params)
    environments(optimizer, params, random_grads(params))
    before = values(params)

    def environment() -> None:
        with optimizer.environment():
            if after_backward:
                backward(params, [g[0] for g in random_grads(params)])
            raise KeyError("out of data")

    with pytest.raises(KeyError):
        environment()
    for call in (optimizer.step, optimizer.write_grads, optimizer.environment().__enter__):
        with pytest.raises(RuntimeError, match=r"an earlier environment raised .* zero_grad\(\)"):
            call()
    assert_equal(params, before)
    optimizer.zero_grad()
    works(optimizer, params)


@makers
def test_an_environment_that_reaches_no_parameter(make: Any) -> None:
    params = parameters()
    optimizer = make(params)
    before = values(params)
    with optimizer.environment():
        torch.ones(2, requires_grad=True).sum().backward()
    with pytest.warns(UserWarning, match="so far none did, and nothing has been updated"):
        optimizer.step()
    assert_equal(params, before)
    works(optimizer, params)


@makers
def test_resolve_without_step(make: Any) -> None:
    params = parameters()
    optimizer = make(params)
    environments(optimizer, params, random_grads(params))
    optimizer.write_grads()
    with pytest.raises(RuntimeError, match="3 environments are left over from a step"):
        environments(optimizer, params, random_grads(params))
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    works(optimizer, params)


@makers
def test_a_grad_from_outside(make: Any) -> None:
    params = parameters()
    optimizer = make(params)
    backward(params, [g[0] for g in random_grads(params)])
    with pytest.raises(RuntimeError, match=r"shape \(3, 4\) has a .grad from outside"):
        environments(optimizer, params, random_grads(params))
    optimizer.zero_grad()
    works(optimizer, params)
    works(optimizer, params)  # a .grad that resolve() left there is not from outside


@makers
def test_more_backward_passes_than_announced(make: Any) -> None:
    params = parameters()
    optimizer = make(params)
    grads = random_grads(params, 4)
    for announced in (1, 3):
        context = optimizer.environment(micro_batches=announced)
        context.__enter__()
        for row in range(announced):
            backward(params, [g[row] for g in grads])
        with pytest.raises(
            RuntimeError, match=rf"expected {announced} backward pass\(es\) to reach"
        ) as error:
            backward(params, [g[announced] for g in grads])
        context.__exit__(error.type, error.value, None)
        optimizer.zero_grad()
    works(optimizer, params)


@makers
def test_another_number_of_environments(make: Any) -> None:
    params = parameters()
    optimizer = make(params, expected_environments=3)
    for count in (1, 2, 4):
        environments(optimizer, params, random_grads(params, count))
        with pytest.raises(RuntimeError, match=f"expected 3 environments .* got {count} "):
            optimizer.step()
        optimizer.zero_grad()
    works(optimizer, params)


@makers
def test_a_context_is_for_one_environment(make: Any) -> None:
    params = parameters()
    optimizer = make(params)
    context = optimizer.environment()
    with context:
        backward(params, [g[0] for g in random_grads(params)])
    with pytest.raises(RuntimeError, match="expected a new context for each environment"):
        context.__enter__()


@makers
def test_a_sparse_gradient(make: Any) -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = make(embedding.parameters())
    with pytest.raises(TypeError, match=r"dense gradient .* layout sparse_coo .*sparse=True"):
        with optimizer.environment():
            embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="call zero_grad"):
        optimizer.step()


@makers
@pytest.mark.parametrize("rule", [am.rules.Median(), am.rules.TrimmedMean()], ids=repr)
def test_a_rule_that_needs_whole_columns(make: Any, rule: am.rules.Rule) -> None:
    with pytest.raises(TypeError, match=r"all environments at once; use andmask_ext.backward"):
        make(parameters(), rule=rule)
    optimizer = make(parameters())
    with pytest.raises(TypeError, match="all environments at once"):
        optimizer.add_param_group({"params": parameters(), "rule": rule})
    assert len(optimizer.param_groups) == 1


def test_arguments_of_environment() -> None:
    optimizer = MAKERS["sgd"](parameters())
    for options, error, message in [
        ({"weight": 0.0}, ValueError, "weight: expected a positive finite number, but got 0.0"),
        ({"weight": float("nan")}, ValueError, "weight: .* but got nan"),
        ({"weight": "1"}, TypeError, "weight: expected a number, but got str"),
        ({"micro_batches": 0}, ValueError, "micro_batches: expected a positive int or None"),
        ({"micro_batches": 1.5}, ValueError, "micro_batches: .* but got 1.5"),
    ]:
        with pytest.raises(error, match=message):
            optimizer.environment(**options)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (None, {"lr": -1.0}, ValueError, r"lr: expected a number in \[0, inf\), but got -1"),
        (None, {"lr": torch.ones(2)}, ValueError, "lr: expected a tensor of one element"),
        (None, {"lr": "1"}, TypeError, "lr: expected a number, but got str"),
        (None, {"weight_decay": -0.1}, ValueError, "weight_decay: .* but got -0.1"),
        (None, {"tau": 1.5}, ValueError, r"tau: .* but got 1.5"),
        (None, {"tau": "1"}, TypeError, "tau: .* but got str"),
        (None, {"maximize": 1}, TypeError, "maximize: expected a bool, but got int"),
        ("AndMaskSGD", {"momentum": -0.1}, ValueError, "momentum: .* but got -0.1"),
        ("AndMaskSGD", {"nesterov": True}, ValueError, "nesterov: expected a momentum"),
        ("AndMaskSGD", {"nesterov": 1, "momentum": 0.9}, TypeError, "nesterov: expected a bool"),
        ("AndMaskAdam", {"betas": (0.9,)}, ValueError, "betas: expected 2 numbers"),
        ("AndMaskAdam", {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]: .* but got 1.0"),
        ("AndMaskAdam", {"eps": -1e-8}, ValueError, "eps: .* but got -1e-08"),
        ("AndMaskAdam", {"amsgrad": 1}, TypeError, "amsgrad: expected a bool, but got int"),
        ("TemporalAndMaskAdam", {"betas": (0.9, 0.9)}, ValueError, "betas: expected 3 numbers"),
        ("TemporalAndMaskAdam", {"bias_correction": 1}, TypeError, "bias_correction: .* bool"),
        ("AndMaskAdamW", {"rescale": 1}, TypeError, "rescale: expected a bool, but got int"),
        ("AndMaskAdamW", {"rule": am.AndMask}, TypeError, "rule: .* but got AndMask"),
        ("AndMaskAdamW", {"rule": 0.5}, TypeError, "rule: .* but got float"),
        ("AndMaskSGD", {"weight_decay_mode": "l2"}, ValueError, "weight_decay_mode: .* 'l2'"),
        ("AndMaskSGD", {"expected_environments": 0}, ValueError, "expected_env.* but got 0"),
        ("AndMaskSGD", {"rule": am.AndMask(0.5), "tau": 0.5}, ValueError, "tau: .* tau=0.5 and"),
        ("AndMaskAdam", {"rule": am.rules.Mean(), "rescale": True}, ValueError, "rescale: .* rule"),
        ("AndMaskAdamW", {"rule": None, "tau": None}, ValueError, "tau: .* but got none of them"),
        ("TemporalAndMaskAdam", {"weight_decay_mode": "before_mask"}, ValueError, "after_mask or"),
    ],
)
def test_options(
    name: str | None, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    names = ["AndMaskSGD", "AndMaskAdam", "AndMaskAdamW", "TemporalAndMaskAdam"]
    for cls in [name] if name else names:
        with pytest.raises(error, match=message):
            getattr(optim, cls)(parameters(), **unanimous(options))
        if "expected_environments" in options or "neither" in message:
            continue
        optimizer = getattr(optim, cls)(parameters(), tau=0.5)
        with pytest.raises(error, match=message):  # a group that is refused is not there afterwards
            optimizer.add_param_group({"params": parameters(), **options})
        assert len(optimizer.param_groups) == 1


def test_parameters_must_be_dense_floats() -> None:
    for name in ("AndMaskSGD", "AndMaskAdamW", "TemporalAndMaskAdam"):
        with pytest.raises(TypeError, match=r"params\[0\]: expected dtype .* but got complex64"):
            getattr(optim, name)(
                [torch.zeros(2, dtype=torch.complex64, requires_grad=True)], tau=1.0
            )


def test_an_expanded_parameter_is_refused_before_anything_moves() -> None:
    param = torch.ones(1).expand(4).requires_grad_()
    optimizer = optim.AndMaskAdam([param], tau=1.0)
    environments(optimizer, [param], [torch.ones(2, 4)])
    with pytest.raises(RuntimeError, match=r"params\[0\] whose elements lie apart"):
        optimizer.step()
    assert float(optimizer.state[param]["step"]) == 0
