"""Saving, loading, copying: a run goes on to the same bits."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import andmask_ext as am

from ..models import mlp
from .common import (
    MAKERS,
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
from .killed_run import OPTIMIZERS

makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def temporal_step(optimizer: Any, params: list[nn.Parameter], grads: list[torch.Tensor]) -> None:
    if isinstance(optimizer, optim.TemporalAndMaskAdam):
        for param, stack in zip(params, grads, strict=True):
            param.grad = stack[0].clone()
    else:
        environments(optimizer, params, grads)
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("through_file", [False, True])
def test_a_loaded_state_goes_on_to_the_same_bits(
    tmp_path: Path, name: str, dtype: torch.dtype, through_file: bool
) -> None:
    params = parameters(dtype)
    straight = OPTIMIZERS[name](params)
    for _ in range(3):
        temporal_step(straight, params, random_grads(params))
    others = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = OPTIMIZERS[name](others)
    state = straight.state_dict()
    if through_file:
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    else:
        state = copy.deepcopy(state)
    resumed.load_state_dict(state)
    for p, q in zip(params, others, strict=True):
        for key, value in straight.state[p].items():
            assert resumed.state[q][key].dtype == value.dtype, key  # wide state stays so
            assert torch.equal(resumed.state[q][key], value)
    for _ in range(3):
        grads = random_grads(params)
        temporal_step(straight, params, grads)
        temporal_step(resumed, others, grads)
        assert_equal(params, others)


def test_a_killed_run_ends_as_one_that_was_left_alone(tmp_path: Path) -> None:
    """kill -9 after some step, resume, and compare the last parameters bit for bit."""

    def run(path: Path, steps: int) -> subprocess.Popen[str]:
        script = Path(__file__).with_name("killed_run.py")
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, script, path, str(steps)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    whole, killed = tmp_path / "whole.pt", tmp_path / "killed.pt"
    with run(killed, 10**9) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "step 4\n":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    done = torch.load(killed, weights_only=True)["step"]  # 4, or more if the signal was slow
    with run(killed, done + 5) as resumed, run(whole, done + 5) as alone:
        output, _ = resumed.communicate()
        alone.communicate()
    assert output.startswith(f"step {done + 1}\n")  # it did not start over
    one, other = (torch.load(path, weights_only=True) for path in (whole, killed))
    for name in OPTIMIZERS:
        for key, value in one[name]["model"].items():
            assert torch.equal(value, other[name]["model"][key]), key
        for key, state in one[name]["optimizer"]["state"].items():
            for kind, value in state.items():
                assert torch.equal(value, other[name]["optimizer"]["state"][key][kind]), kind


@makers
@pytest.mark.parametrize("through_file", [False, True])
def test_a_state_between_two_environments(tmp_path: Path, make: Any, through_file: bool) -> None:
    params = parameters()
    straight = make(params)
    grads, rest = random_grads(params, 2), random_grads(params, 2)
    environments(straight, params, grads)
    state = straight.state_dict()
    if through_file:
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(others)
    environments(resumed, others, rest)  # dropped when a state is loaded
    resumed.load_state_dict(state)
    for optimizer, chosen in ((straight, params), (resumed, others)):
        environments(optimizer, chosen, rest)
        optimizer.step()
    assert_equal(params, others)
    assert "environments" not in resumed.state_dict()


@makers
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("when", ["fresh", "after a step", "between environments"])
def test_copies_of_model_and_optimizer_go_on_alike(make: Any, how: str, when: str) -> None:
    model, data = mlp(), batches()
    optimizer = make(model.parameters(), tau=0.5)
    if when != "fresh":
        train_step(optimizer, model, data)
        optimizer.zero_grad()
    if when == "between environments":
        with optimizer.environment():
            nn.functional.mse_loss(model(data[0][0]), data[0][1]).backward()
    pair = (model, optimizer)
    copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    other, other_optimizer = copied
    assert_equal(list(model.parameters()), list(other.parameters()))
    more = batches()
    train_step(optimizer, model, more)
    moved = values(model.parameters())
    assert not torch.equal(moved[0], next(other.parameters()))  # nothing is shared
    train_step(other_optimizer, other, more)
    assert_equal(moved, list(other.parameters()))
    assert_equal(moved, list(model.parameters()))


@pytest.mark.filterwarnings("error")
def test_a_model_is_copied_and_saved_without_its_optimizer(tmp_path: Path) -> None:
    model = mlp()
    optimizer = MAKERS["adam"](model.parameters())
    train_step(optimizer, model, batches())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(list(model.parameters()), list(other.parameters()))
        other(torch.randn(2, 4)).sum().backward()
        assert all(p.grad is not None for p in other.parameters())
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=True)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True), optim.AndMaskAdamW),
        (lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1), optim.AndMaskAdam),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), optim.AndMaskSGD),
        (lambda p: torch.optim.SGD(p, lr=0.1), optim.AndMaskSGD),
    ],
    ids=["AdamW", "Adam", "SGD", "plain SGD"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_states_of_torch_optimizers_load(theirs: Any, ours: Any, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    before = theirs(params)
    for step in range(6):
        if step == 3:
            others = [nn.Parameter(p.detach().clone()) for p in params]
            after = ours(others, tau=0.0, expected_environments=2)
            after.load_state_dict(copy.deepcopy(before.state_dict()))
        grads = random_grads(params, 2)
        for param, stack in zip(params, grads, strict=True):
            param.grad = stack.mean(0)
        before.step()
        if step >= 3:
            environments(after, others, grads)
            after.step()
            if dtype == torch.float64:
                for p, q in zip(params, others, strict=True):
                    torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
    wide = {t.dtype for state in after.state.values() for k, t in state.items() if k != "step"}
    assert wide <= {torch.float64 if dtype == torch.float64 else torch.float32}
    assert after.param_groups[0]["tau"] == 0.0  # an option that torch has not keeps its value


def test_a_half_finished_step_cannot_be_saved() -> None:
    params = parameters()
    optimizer = MAKERS["sgd"](params)
    environments(optimizer, params, random_grads(params))
    optimizer.write_grads()
    with pytest.raises(RuntimeError, match=r"state_dict: .* written, broken or scaled half-way"):
        optimizer.state_dict()
    optimizer.step()
    optimizer.state_dict()


def test_rules_of_groups_are_saved_and_loaded(tmp_path: Path) -> None:
    params = parameters()
    rules = [am.rules.Mean(), am.rules.SandMask(0.3, 2.0), None]
    groups = [{"params": [p], "rule": rule} for p, rule in zip(params, rules, strict=True)]
    optimizer = optim.AndMaskAdam(groups, tau=0.7)
    environments(optimizer, params, random_grads(params))
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = optim.AndMaskAdam([{"params": [p]} for p in params], tau=1.0)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [group["rule"] for group in other.param_groups] == rules
    assert [group["tau"] for group in other.param_groups] == [None, None, 0.7]


def test_loading_drops_environments_of_before() -> None:
    params = parameters()
    optimizer = MAKERS["adam"](params)
    state = optimizer.state_dict()
    environments(optimizer, params, random_grads(params))
    optimizer.load_state_dict(state)
    assert optimizer._pending.environments == 0
    with optimizer.environment():
        backward(params, [g[0] for g in random_grads(params)])
    optimizer.step()
