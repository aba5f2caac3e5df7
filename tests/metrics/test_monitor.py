"""The monitor: what it records, and when."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import andmask_ext as am
from andmask_ext import metrics, reference
from andmask_ext.metrics._record import METRICS
from tests.models import mlp
from tests.optim.common import (
    MAKERS,
    backward,
    batches,
    environments,
    parameters,
    random_grads,
    train_step,
)

makers = pytest.mark.parametrize("maker", MAKERS)


def expected(grads: list[Tensor], tau: float) -> dict[str, list[float]]:
    """What each metric is for each parameter, and for all."""
    flat = [stack.double().reshape(len(stack), -1) for stack in grads]
    rows: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for param_grads in (*flat, torch.cat(flat, 1)):
        mean = param_grads.mean(0)
        mask = reference.agreement_mask(param_grads, tau)
        rows["sign_agreement"].append(
            (reference.votes(param_grads).abs() / len(param_grads)).mean().item()
        )
        rows["kept_fraction"].append(mask.mean().item())
        noise = metrics.noise_kept_probability(len(param_grads), tau)
        rows["noise_kept_fraction"].append(noise)
        rows["threshold"].append(reference.vote_threshold(tau, len(param_grads)) / len(param_grads))
        kept = mask.mean().item()
        rows["noise_share"].append(min(1, noise / kept) if kept else float("nan"))
        rows["norm"].append(mean.norm().item())
        rows["masked_norm"].append((mask * mean).norm().item())
        rows["coherence"].append(
            (param_grads.sum(0).square().sum() / param_grads.square().sum()).item()
        )
    return rows


def assert_record(monitor: metrics.Monitor, grads: list[Tensor], tau: float) -> None:
    for metric, row in expected(grads, tau).items():
        found = [*monitor.series(metric)[-1].tolist(), monitor.total(metric)[-1].item()]
        assert found == pytest.approx(row, rel=1e-5, abs=1e-7, nan_ok=True), metric


@makers
def test_every_metric_of_an_optimizer(maker: str) -> None:
    params = parameters()
    optimizer = MAKERS[maker](params, tau=0.5)
    monitor = metrics.Monitor(optimizer, every=1)
    for step in range(3):
        grads = random_grads(params, environments=5)
        environments(optimizer, params, grads)
        optimizer.step()
        assert_record(monitor, grads, 0.5)
        assert monitor.steps == list(range(step + 1))
    assert monitor.names == ["0.0", "0.1", "0.2"]
    assert monitor.series("norm").shape == (3, 3)
    assert monitor.total("norm").shape == (3,)


@makers
def test_training_is_the_same_to_the_bit(maker: str) -> None:
    results = []
    data = batches()
    for watched in (False, True):
        torch.manual_seed(1)
        model = mlp()
        optimizer = MAKERS[maker](model.parameters(), tau=0.5)
        if watched:
            metrics.Monitor(optimizer, every=2)
        for _ in range(4):
            train_step(optimizer, model, data)
        results.append([p.detach() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_an_agreement(with_optimizer: bool) -> None:
    model = mlp()
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    grads = []
    for row in range(6):
        loss = nn.functional.mse_loss(model(x[row : row + 1]), y[row : row + 1])
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    stacked = [torch.stack(column) for column in zip(*grads, strict=True)]
    rule: Any = am.AndMask(0.5)
    if with_optimizer:
        rule = am.optim.AndMaskSGD(model.parameters(), lr=0.1, tau=0.5)
    agreement = am.Agreement(model, rule)
    monitor = metrics.Monitor(agreement)
    with agreement():
        nn.functional.mse_loss(model(x), y).backward()
    if with_optimizer:
        rule.step()
    assert monitor.names == [name for name, _ in model.named_parameters()]
    assert_record(monitor, stacked, 0.5)


def test_micro_batches_of_an_agreement_are_one_record() -> None:
    model = mlp()
    agreement = am.Agreement(model, am.AndMask(0.5))
    monitor = metrics.Monitor(agreement, every=1)
    for part in range(3):
        with agreement(2, write_grads=part == 2):
            model(torch.randn(4, 4)).square().mean().backward()
    assert monitor.steps == [0]
    assert monitor.total("noise_kept_fraction")[0].item() == pytest.approx(
        metrics.noise_kept_probability(6, 0.5)
    )
    assert torch.isfinite(monitor.total("coherence")).all()


def test_only_some_steps_are_recorded_and_norms_are_not_taken_between() -> None:
    params = parameters()
    optimizer = MAKERS["sgd"](params, tau=0.5)
    monitor = metrics.Monitor(optimizer, every=3)
    tracked = []
    for _ in range(7):
        environments(optimizer, params, random_grads(params))
        tracked.append(optimizer._pending.moments[0].squared_norms is not None)
        optimizer.step()
    assert monitor.steps == [0, 3, 6]
    assert tracked == [True, False, False, True, False, False, True]
    assert torch.isfinite(monitor.series("coherence")).all()


def test_without_coherence_and_with_another_tau() -> None:
    params = parameters()
    optimizer = MAKERS["sgd"](params, tau=0.0)  # plain training
    monitor = metrics.Monitor(optimizer, tau=1.0, coherence=False)
    grads = random_grads(params)
    environments(optimizer, params, grads)
    assert optimizer._pending.moments[0].squared_norms is None
    optimizer.step()
    assert torch.isnan(monitor.series("coherence")).all()
    row = expected(grads, 1.0)
    assert monitor.series("kept_fraction")[0].tolist() == pytest.approx(row["kept_fraction"][:-1])
    assert monitor.total("masked_norm")[0].item() == pytest.approx(row["masked_norm"][-1])


def test_squares_that_a_rule_keeps_give_the_coherence() -> None:
    """A state that was saved half-way through a step brings no norms with it."""
    params = parameters()
    grads = random_grads(params)
    rule = am.rules.SandMask(tau=0.3, k=1.0)
    first = MAKERS["sgd"](params, rule=rule)
    environments(first, params, grads)
    second = MAKERS["sgd"]([nn.Parameter(p.detach().clone()) for p in params], rule=rule)
    monitor = metrics.Monitor(second)
    second.load_state_dict(first.state_dict())
    second.step()
    assert_record(monitor, grads, 0.3)


def test_groups_rules_and_parameters_that_nothing_touches() -> None:
    params = parameters()
    optimizer = am.optim.AndMaskSGD(
        [{"params": params[:1], "tau": 0.4}, {"params": params[1:], "rule": am.rules.Mean()}],
        lr=0.1,
    )
    monitor = metrics.Monitor(optimizer, names=[("a", params[0]), ("b", params[1])])
    grads = [torch.randn(4, *p.shape) for p in params]
    for row in range(4):
        with optimizer.environment():
            backward([params[0], params[2]], [grads[0][row], grads[2][row]])
    optimizer.step()
    assert monitor.names == ["a", "b", "1.1"]
    whole = expected([grads[0], grads[2]], 0.4)
    # The mean needs no votes. They are counted for the monitor; without a threshold it keeps all.
    assert monitor.series("kept_fraction")[0].isnan().tolist() == [False, True, False]
    assert monitor.series("kept_fraction")[0, 2].item() == 1
    assert monitor.series("masked_norm")[0, 2].item() == pytest.approx(whole["norm"][1])
    assert monitor.series("sign_agreement")[0, [0, 2]].tolist() == pytest.approx(
        whole["sign_agreement"][:2]
    )
    assert monitor.total("sign_agreement").item() == pytest.approx(whole["sign_agreement"][-1])
    assert monitor.series("norm")[0, [0, 2]].tolist() == pytest.approx(whole["norm"][:2])
    assert monitor.series("norm")[0].isnan().tolist() == [False, True, False]
    assert monitor.total("norm").item() == pytest.approx(whole["norm"][-1])
    assert monitor.total("coherence").item() == pytest.approx(whole["coherence"][-1])


def test_a_rule_without_votes() -> None:
    """What a threshold would keep of plain training, whose updates stay the same bits."""
    sets = [parameters() for _ in range(2)]
    grads = [torch.randn(4, *p.shape) for p in sets[0]]
    for params, monitored in zip(sets, (True, False), strict=True):
        with torch.no_grad():
            for param in params:
                param.fill_(1)
        optimizer = am.optim.EnvironmentWrapper(torch.optim.AdamW(params), am.rules.Mean())
        if monitored:
            monitor = metrics.Monitor(optimizer, tau=0.6)
        for _ in range(2):
            environments(optimizer, params, grads)
            optimizer.step()
    wanted = expected(grads, 0.6)
    for metric, values in wanted.items():
        found = monitor.latest[f"{metric}/all"].item()
        assert found == pytest.approx(values[-1], nan_ok=True), metric
    for one, other in zip(*sets, strict=True):
        assert torch.equal(one, other)


def test_what_is_not_finite_is_not_hidden() -> None:
    params = parameters()
    optimizer = MAKERS["sgd"](params, tau=1.0)
    monitor = metrics.Monitor(optimizer)
    grads = random_grads(params)
    grads[0][1, 0, 0] = torch.nan
    environments(optimizer, params, grads)
    optimizer.step()
    for metric in ("norm", "masked_norm", "coherence"):
        assert monitor.series(metric)[0].isnan().tolist() == [True, False, False]
        assert monitor.total(metric).isnan().all()


def test_a_step_that_overflows_is_none() -> None:
    params = parameters()
    optimizer = MAKERS["sgd"](params, tau=0.5)
    monitor = metrics.Monitor(optimizer, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    for bad in (True, False):
        grads = random_grads(params)
        if bad:
            grads[0][0, 0, 0] = torch.inf
        for row in range(3):
            with optimizer.environment(grad_scaler=scaler):
                backward(params, [one[row] for one in grads], scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert monitor.steps == [0]
    assert_record(monitor, grads, 0.5)


def test_a_step_after_resolve() -> None:
    params = parameters()
    optimizer = MAKERS["sgd"](params, tau=0.5)
    monitor = metrics.Monitor(optimizer)
    grads = random_grads(params)
    environments(optimizer, params, grads)
    optimizer.write_grads()
    nn.utils.clip_grad_norm_(params, 0.01)
    optimizer.step()
    assert_record(monitor, grads, 0.5)


def test_parameters_that_are_added() -> None:
    """Earlier records have no value for them."""
    params = parameters()
    optimizer = MAKERS["sgd"](params[:2], tau=0.5)
    monitor = metrics.Monitor(optimizer, every=1)
    first = random_grads(params[:2])
    environments(optimizer, params[:2], first)
    optimizer.step()
    optimizer.add_param_group({"params": params[2:]})
    grads = random_grads(params)
    environments(optimizer, params, grads)
    optimizer.step()
    assert_record(monitor, grads, 0.5)
    assert monitor.names == ["0.0", "0.1", "1.0"]
    for metric, row in expected(first, 0.5).items():
        assert monitor.series(metric)[0].tolist() == pytest.approx(
            [*row[:2], float("nan")], rel=1e-5, nan_ok=True
        )
        assert monitor.total(metric)[0].item() == pytest.approx(row[-1], rel=1e-5)


def test_a_monitor_of_every_step_gives_norms_to_the_user_as_well() -> None:
    model = mlp()
    agreement = am.Agreement(model, am.AndMask(1.0), keep_moments=True)
    monitor = metrics.Monitor(agreement, every=1)
    for record in range(3):
        with agreement():
            model(torch.randn(4, 4)).square().mean().backward()
        coherence = metrics.coherence(agreement.moments[0])
        assert coherence.item() == pytest.approx(monitor.total("coherence")[record].item())
    monitor.detach()
    with agreement():
        model(torch.randn(4, 4)).square().mean().backward()
    assert agreement.moments[0].squared_norms is None


def test_groups_that_are_touched_late() -> None:
    """An environment that does not reach a group has gradient zero there, and counts."""
    params = parameters()
    grads = random_grads(params, environments=4)
    results = []
    for order in ((0, 1, 2, 3), (1, 0, 2, 3)):
        optimizer = am.optim.AndMaskSGD(
            [{"params": params[:1]}, {"params": params[1:]}], lr=0.0, tau=0.5
        )
        monitor = metrics.Monitor(optimizer)
        for row in order:
            with optimizer.environment():
                some = slice(0, 1) if row == 0 else slice(None)
                backward(params[some], [one[row] for one in grads[some]])
        optimizer.step()
        results.append(monitor)
    whole = [grads[0], *(one.clone() for one in grads[1:])]
    for one in whole[1:]:
        one[0] = 0
    for monitor in results:
        assert_record(monitor, whole, 0.5)


def test_a_step_that_reaches_no_parameter() -> None:
    model = mlp()
    agreement = am.Agreement(model, am.AndMask(1.0))
    monitor = metrics.Monitor(agreement, every=1)
    other = torch.ones((), requires_grad=True)
    with agreement():
        model(torch.randn(4, 4))
        (other * 1).backward()
    assert monitor.steps == [0]
    assert all(torch.isnan(value) for value in monitor.latest.values())


def test_the_optimizer_is_freed_with_its_last_reference() -> None:
    optimizer = MAKERS["sgd"](parameters())
    monitor = metrics.Monitor(optimizer)
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
    monitor.detach()


@pytest.mark.no_device
def test_norms_of_large_parameters() -> None:
    """Equal environments have a coherence of their number, however long the gradient is."""
    param = nn.Parameter(torch.zeros(6_000_000))
    optimizer = MAKERS["sgd"]([param])
    monitor = metrics.Monitor(optimizer)
    grad = torch.randn(6_000_000)
    for _ in range(3):
        with optimizer.environment():
            backward([param], [grad])
    optimizer.step()
    assert monitor.total("coherence").item() == pytest.approx(3.0, rel=1e-6)
