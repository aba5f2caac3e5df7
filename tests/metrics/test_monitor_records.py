"""The monitor: how records come out, go into checkpoints, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch

import andmask_ext as am
from andmask_ext import metrics
from andmask_ext.metrics._record import METRICS
from tests.models import mlp
from tests.optim.common import (
    MAKERS,
    environments,
    parameters,
    random_grads,
)


def test_latest() -> None:
    params = parameters()
    optimizer = MAKERS["sgd"](params, tau=0.5)
    monitor = metrics.Monitor(optimizer)
    with pytest.raises(RuntimeError, match="latest: expected a step before"):
        monitor.latest  # noqa: B018
    assert monitor.total("norm").shape == (0,)
    assert monitor.to_dataframe().empty
    environments(optimizer, params, random_grads(params))
    optimizer.step()
    latest = monitor.latest
    assert len(latest) == len(METRICS) * 4
    assert all(one.dim() == 0 for one in latest.values())
    assert latest["norm/all"] == monitor.total("norm")[-1]
    assert latest["norm/0.1"] == monitor.series("norm")[-1, 1]


def trained(records: int = 3) -> metrics.Monitor:
    params = parameters()
    optimizer = MAKERS["sgd"](params, tau=0.5)
    monitor = metrics.Monitor(optimizer, every=2)
    for _ in range(2 * records - 1):
        environments(optimizer, params, random_grads(params))
        optimizer.step()
    return monitor


def test_dataframe() -> None:
    monitor = trained()
    frame = monitor.to_dataframe()
    assert list(frame.columns) == ["step", "parameter", *METRICS]
    assert len(frame) == 3 * 4
    assert frame.step.unique().tolist() == [0, 2, 4]
    chosen = frame[(frame.step == 2) & (frame.parameter == "0.1")]
    for metric in METRICS:
        recorded = monitor.series(metric)[1, 1].item()
        assert chosen[metric].item() == recorded or math.isnan(recorded), metric
    assert frame[frame.parameter == "all"].norm.tolist() == monitor.total("norm").tolist()


def test_dataframe_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_dataframe needs pandas: `pip install pandas`"):
        trained().to_dataframe()


def test_tensorboard(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = trained()
    with tensorboard.SummaryWriter(tmp_path) as writer:
        monitor.write(writer)
        monitor.write(writer)  # nothing new
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    curve = events.Scalars("kept_fraction/all")
    assert [point.step for point in curve] == [0, 2, 4]
    assert [point.value for point in curve] == pytest.approx(
        monitor.total("kept_fraction").tolist()
    )
    assert len(events.Tags()["scalars"]) == len(METRICS) * 4


def test_a_run_that_is_resumed() -> None:
    params = parameters()
    optimizer = MAKERS["sgd"](params, tau=0.5)
    grads = [random_grads(params) for _ in range(4)]
    whole = metrics.Monitor(optimizer, every=2)
    first = metrics.Monitor(optimizer, every=2)
    second = metrics.Monitor(optimizer, every=2)
    for step in range(4):
        if step == 3:
            state = pickle.loads(pickle.dumps(first.state_dict()))
            second.load_state_dict(state)
            first.detach()
            first.detach()  # once more does no harm
        environments(optimizer, params, grads[step])
        optimizer.step()
    assert first.steps == second.steps == whole.steps == [0, 2]
    assert torch.equal(second.series("norm"), whole.series("norm"))
    assert second._step == whole._step == 4
    assert first._step == 3


def test_optimizers_copy_and_pickle_without_their_monitors() -> None:
    params = parameters()
    optimizer = MAKERS["sgd"](params, tau=0.5)
    monitor = metrics.Monitor(optimizer, every=1)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        own = other.param_groups[0]["params"]
        environments(other, own, random_grads(own))
        other.step()
    assert monitor.steps == []


def test_errors() -> None:
    params = parameters()
    optimizer = MAKERS["sgd"](params)
    with pytest.raises(TypeError, match=r"source: expected an optimizer of andmask_ext.optim that"):
        metrics.Monitor(torch.optim.SGD(params, lr=0.1))
    with pytest.raises(TypeError, match=r"source: expected .* but got TemporalAndMaskAdam"):
        metrics.Monitor(am.optim.TemporalAndMaskAdam(params, tau=0.5))
    with pytest.raises(ValueError, match="every: expected at least 1, but got 0"):
        metrics.Monitor(optimizer, every=0)
    with pytest.raises(TypeError, match="every: expected an int, but got float"):
        metrics.Monitor(optimizer, every=0.5)
    with pytest.raises(ValueError, match="tau: expected"):
        metrics.Monitor(optimizer, tau=2.0)
    with pytest.raises(ValueError, match=r"metric: expected one of sign_agreement, .*but got 'x'"):
        metrics.Monitor(optimizer).series("x")


def test_names_in_a_dict_and_what_are_no_names() -> None:
    params = parameters()
    optimizer = MAKERS["sgd"](params)
    named = dict(zip("abc", params, strict=True))
    monitor = metrics.Monitor(optimizer, names=named)
    environments(optimizer, params, random_grads(params))
    optimizer.step()
    assert monitor.names == ["a", "b", "c"]
    for wrong in ("abc", params, ["a", "b"], 3):
        with pytest.raises(TypeError, match="names: expected pairs of name and parameter"):
            metrics.Monitor(optimizer, names=wrong)


def test_records_of_another_model() -> None:
    state = trained().state_dict()
    model = mlp()
    for source in (am.Agreement(model, am.AndMask(1.0)), MAKERS["sgd"](model.parameters())):
        monitor = metrics.Monitor(source)
        with pytest.raises(ValueError, match=r"state: expected records of 4 parameters \(.*got 3"):
            monitor.load_state_dict(state)
        monitor.load_state_dict(metrics.Monitor(source).state_dict())  # no records yet


def test_a_temporal_optimizer_is_refused_with_a_reason() -> None:
    optimizer = am.optim.TemporalAndMaskAdam(parameters(), tau=0.5)
    with pytest.raises(TypeError, match="but got TemporalAndMaskAdam, which sees one in each step"):
        metrics.Monitor(optimizer)


def test_records_of_an_earlier_version_have_no_threshold() -> None:
    monitor = trained()
    state, before = monitor.state_dict(), monitor.series("norm")
    for record in state["records"]:
        del record["threshold"], record["noise_share"]
    monitor.load_state_dict(state)
    assert torch.equal(monitor.series("norm"), before)
    for metric in ("threshold", "noise_share"):
        assert monitor.series(metric).shape == (3, 3)
        assert monitor.series(metric).isnan().all()
    assert len(monitor.to_dataframe()) == 3 * 4


def test_records_from_elsewhere_join_those_of_a_device() -> None:
    monitor = trained()
    state = monitor.state_dict()
    state["records"][-1] = {k: v.to("meta") for k, v in state["records"][-1].items()}
    monitor.load_state_dict(state)
    assert monitor.series("norm").device.type == "meta"  # that of the last one
    assert monitor.series("norm").shape == (3, 3)
