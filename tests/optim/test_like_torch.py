"""What torch.optim takes: parameters, options, states and hooks."""

from __future__ import annotations

import copy
import sys
from collections import UserList
from collections.abc import Callable
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

import andmask_ext as am

from .common import MAKERS, assert_equal, backward, environments, parameters, random_grads, values

makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
OWN = [
    am.optim.AndMaskSGD,
    am.optim.AndMaskAdam,
    am.optim.AndMaskAdamW,
    am.optim.TemporalAndMaskAdam,
]
own = pytest.mark.parametrize("kind", OWN)


def temporal(params: Any, **options: Any) -> Any:
    return am.optim.TemporalAndMaskAdam(params, lr=0.1, tau=0.0, **options)


WITH_TEMPORAL: dict[str, Callable[..., Any]] = {**MAKERS, "temporal": temporal}
all_makers = pytest.mark.parametrize("make", WITH_TEMPORAL.values(), ids=WITH_TEMPORAL)


def train(optimizer: Any, params: list[nn.Parameter], seed: int) -> None:
    torch.manual_seed(seed)
    grads = random_grads(params)
    if isinstance(optimizer, am.optim.TemporalAndMaskAdam):
        backward(params, [stack[0] for stack in grads])
    else:
        environments(optimizer, params, grads)
    optimizer.step()
    optimizer.zero_grad()


# ---- parameters ----

FROZEN = [torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]


@all_makers
@pytest.mark.parametrize("dtype", FROZEN, ids=str)
@pytest.mark.parametrize("kind", [nn.Parameter, lambda data, **_: data], ids=["parameter", "plain"])
def test_frozen_parameters_of_any_dtype(make: Any, dtype: torch.dtype, kind: Any) -> None:
    params = parameters()
    others = copy.deepcopy(params)
    frozen = kind(torch.ones(3).to(dtype), requires_grad=False)
    optimizer, plain = make([frozen, *params]), make(others)
    optimizer.add_param_group({"params": [kind(torch.ones(2).to(dtype), requires_grad=False)]})
    for seed in range(2):
        train(optimizer, params, seed)
        train(plain, others, seed)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_equal(params, others)


@all_makers
def test_a_parameter_that_cannot_have_moments_is_refused_when_it_gets_a_gradient(make: Any) -> None:
    param = nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False)
    optimizer = make([nn.Parameter(torch.ones(2)), param])
    param.requires_grad_(True)

    def step() -> None:
        if isinstance(optimizer, am.optim.TemporalAndMaskAdam):
            param.abs().sum().backward()
        else:
            with optimizer.environment():
                param.abs().sum().backward()
        optimizer.step()

    with pytest.raises(TypeError, match=r"params\[1\]: expected dtype .* but got complex64"):
        step()


def test_agreement_passes_over_frozen_parameters() -> None:
    model = nn.Linear(3, 2)
    for index, dtype in enumerate(FROZEN):
        frozen = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)
        model.register_parameter(f"frozen{index}", frozen)
    optimizer = am.optim.AndMaskSGD(model.parameters(), lr=0.1, tau=0.5)
    for target in (optimizer, am.AndMask(0.5)):
        with am.Agreement(model, target)():
            model(torch.randn(4, 3)).square().mean().backward()
        assert model.weight.grad is not None
        if target is optimizer:
            optimizer.step()
        optimizer.zero_grad()


# ---- options ----


@pytest.mark.parametrize(
    "betas",
    [
        [0.9, 0.99], UserList([0.9, 0.99]), np.array([0.9, 0.99]), (np.float64(0.9), 0.99),
        torch.tensor([0.9, 0.99], dtype=torch.float64),
        (torch.tensor(0.9, dtype=torch.float64), torch.tensor([0.99], dtype=torch.float64)),
    ],
    ids=lambda betas: type(betas).__name__,
)  # fmt: skip
def test_betas_of_any_sequence(betas: Any) -> None:
    optimizer = am.optim.AndMaskAdam(parameters(), betas=betas, tau=0.5)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize("betas", ["ab", {0.9: 1, 0.8: 2}, 0.9, {0.9, 0.8}, (True, 0.9)], ids=repr)
def test_betas_that_are_none(betas: Any) -> None:
    with pytest.raises(TypeError, match="betas"):
        am.optim.AndMaskAdam(parameters(), betas=betas, tau=0.5)


@own
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_numbers_of_other_types(kind: Any, name: str) -> None:
    for value in (np.float32(0.5), np.array(0.5), torch.tensor(0.5), np.float64(0.5)):
        optimizer = kind(parameters(), tau=0.5, **{name: value})
        found = optimizer.param_groups[0][name]
        assert found == 0.5
        assert isinstance(found, float) or (name == "lr" and found is value)
    for wrong in (np.array([0.5, 0.5]), np.bool_(True), 1j, "0.5", None):
        with pytest.raises(TypeError, match=f"{name}: expected a number"):
            kind(parameters(), tau=0.5, **{name: wrong})


@own
def test_options_that_choose_an_implementation(kind: Any) -> None:
    for value in (None, True, False):
        kind(parameters(), tau=0.5, foreach=value, fused=value, capturable=False)
    for name in ("capturable", "differentiable"):
        with pytest.raises(ValueError, match=rf"{name}: {kind.__name__} expected False"):
            kind(parameters(), tau=0.5, **{name: True})
    with pytest.raises(TypeError, match="fused: expected a bool or None, but got int"):
        kind(parameters(), tau=0.5, fused=1)


# ---- torch.distributed.checkpoint ----


@all_makers
@pytest.mark.parametrize("option", ["plain", "full_state_dict", "flatten_optimizer_state_dict"])
def test_a_state_goes_through_torch_distributed_checkpoint(make: Any, option: str) -> None:
    options = None if option == "plain" else StateDictOptions(**{option: True})
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters())
    train(optimizer, list(model.parameters()), 0)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    fresh = copy.deepcopy(model)
    resumed = make(fresh.parameters())
    before = values(list(fresh.parameters()))
    get_optimizer_state_dict(fresh, resumed, options=options)  # makes the state of a fresh one
    assert_equal(list(fresh.parameters()), before)
    set_optimizer_state_dict(fresh, resumed, optim_state_dict=saved, options=options)
    for one, params in ((optimizer, model.parameters()), (resumed, fresh.parameters())):
        train(one, list(params), 1)
    assert_equal(list(model.parameters()), list(fresh.parameters()))


def test_a_fresh_state_that_is_only_looked_at_changes_nothing() -> None:
    for name in ("sgd", "adam", "adamw"):
        model = nn.Linear(3, 2)
        other = copy.deepcopy(model)
        optimizer, plain = MAKERS[name](model.parameters()), MAKERS[name](other.parameters())
        get_optimizer_state_dict(model, optimizer)
        train(optimizer, list(model.parameters()), 0)
        train(plain, list(other.parameters()), 0)
        assert_equal(list(model.parameters()), list(other.parameters()))


# ---- states ----


@all_makers
def test_two_optimizers_share_no_state_after_loading(make: Any) -> None:
    params = parameters()
    others = copy.deepcopy(params)
    one, other = make(params), make(others)
    train(one, params, 0)
    for param, copied in zip(params, others, strict=True):
        copied.data.copy_(param.data)
    other.load_state_dict(one.state_dict())
    train(one, params, 1)
    train(other, others, 1)
    assert_equal(params, others)


def test_a_state_of_adam_loads_into_the_temporal_mask() -> None:
    params = parameters()
    adam = torch.optim.Adam(params, lr=0.01)
    train_plain(adam, params)
    optimizer = am.optim.TemporalAndMaskAdam(params, lr=0.1, tau=0.4)
    optimizer.load_state_dict(adam.state_dict())
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999, 0.9)
    assert optimizer.param_groups[0]["tau"] == 0.4
    train_plain(optimizer, params)
    assert (optimizer.state[params[0]]["sign_avg"].abs() <= 0.1 + 1e-6).all()


def train_plain(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.zero_grad()
    backward(params, [stack[0] for stack in random_grads(params)])
    optimizer.step()


def test_states_of_another_kind_are_refused_by_name() -> None:
    params = parameters()
    sgd, adam = MAKERS["sgd"](params), MAKERS["adam"](params)
    train(sgd, params, 0)
    train(adam, params, 0)
    for optimizer, state, missing in ((sgd, adam, "momentum_buffer"), (adam, sgd, "exp_avg")):
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match=f"state_dict: expected .*{missing}.* of parameter 0"):
            optimizer.load_state_dict(state.state_dict())
        assert before.keys() == optimizer.state_dict().keys()
    broken = copy.deepcopy(adam.state_dict())
    broken["state"][1]["exp_avg"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 1 of shape \(\), but got shape"):
        adam.load_state_dict(broken)
    with pytest.raises(ValueError, match="expected the keys state and param_groups, but got model"):
        adam.load_state_dict({"model": broken})


@pytest.mark.parametrize("name", sorted(WITH_TEMPORAL.keys() - {"wrapper"}))  # torch's decide
def test_a_model_that_is_cast_between_steps(name: str) -> None:
    model = nn.Linear(3, 2).double()
    optimizer = WITH_TEMPORAL[name](model.parameters())
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float64):
        model.to(dtype)
        train(optimizer, list(model.parameters()), 0)
        for state in optimizer.state.values():
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert {v.dtype for k, v in state.items() if k != "step"} == {wide}


# ---- hooks ----


@all_makers
def test_hooks_of_states_are_run_and_may_replace_the_state(make: Any) -> None:
    params = [nn.Parameter(torch.randn(3).bfloat16())]
    optimizer = make(params)
    train(optimizer, params, 0)
    good, seen = copy.deepcopy(optimizer.state_dict()), []
    good["param_groups"][0]["lr"] = 0.25

    def replace(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append("before")
        return good

    def after(loaded: Any) -> None:
        seen.append("after")
        assert loaded.param_groups[0]["lr"] == 0.25
        assert "rule" not in loaded.param_groups[0] or not isinstance(
            loaded.param_groups[0]["rule"], dict
        )

    optimizer.register_load_state_dict_pre_hook(replace)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    optimizer.load_state_dict({"nothing": "of use"})
    assert optimizer.state_dict()["mine"] == 1
    assert seen == ["before", "after", "saving"]


@all_makers
def test_hooks_of_all_optimizers_run_once(make: Any) -> None:
    module = sys.modules["torch.optim.optimizer"]
    params, seen = parameters(), []
    optimizer = make(params)
    handles = [
        module.register_optimizer_step_pre_hook(lambda one, *_: seen.append(("before", one))),
        module.register_optimizer_step_post_hook(lambda one, *_: seen.append(("after", one))),
    ]
    try:
        train(optimizer, params, 0)
    finally:
        for handle in handles:
            handle.remove()
    stepped = getattr(optimizer, "optimizer", optimizer)
    assert seen == [("before", stepped), ("after", stepped)]
