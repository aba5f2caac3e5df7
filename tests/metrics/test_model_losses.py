"""Losses of a module as functions of its parameters, and the errors of the score's arguments."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from andmask_ext.metrics.consistency import hessian_diagonals, inconsistency_score, model_losses

from .common import point, quadratic_losses, seeded

F64 = torch.float64


def environments(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(30, 3, dtype=F64), torch.randn(30, 1, dtype=F64)) for _ in range(count)]


def test_values_and_hessians_are_those_of_the_module() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    data = environments()
    losses, params = model_losses(model, data, F.mse_loss)
    for loss, (x, y) in zip(losses, data, strict=True):
        torch.testing.assert_close(loss(params), F.mse_loss(model(x), y))
    x = [inputs for inputs, _ in data]
    best = torch.zeros(3, dtype=F64)
    noiseless = [(inputs, (inputs @ best)[:, None]) for inputs in x]
    with torch.no_grad():
        model.weight.copy_(best[None])
    losses, params = model_losses(model, noiseless, F.mse_loss)
    found = inconsistency_score(losses, params, 0.1)
    grams = [inputs.mT @ inputs for inputs in x]
    ratios = [torch.linalg.eigvals(torch.linalg.solve(a, b)) for a in grams for b in grams]
    expected = 0.1 * max(float(r.real.max()) for r in ratios)
    assert float(found.score) == pytest.approx(expected, rel=1e-8)
    assert found.bound == "exact"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("method", ["search", "diagonal"])
def test_mode_is_respected_and_state_kept(training: bool, method: str) -> None:
    model, data = Net().train(training), environments()
    before = copy.deepcopy(model.state_dict())
    losses, params = model_losses(model, data, F.mse_loss)
    found = inconsistency_score(losses, params, 0.01, method, steps=5, generator=seeded())
    assert not any("point by point" in note for note in found.notes)
    assert float(found.score) > 0
    values = [float(loss(params)) for loss in losses]
    assert model.training == model.layers[1].training == training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        expected = [float(F.mse_loss(copy.deepcopy(model)(x), y)) for x, y in data]
    assert values == pytest.approx(expected)


def test_later_changes_of_the_module_do_not_matter() -> None:
    model, data = Net().eval(), environments()
    losses, params = model_losses(model, data, F.mse_loss)
    before = float(losses[0](params))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.mul_(2)
    assert float(losses[0](params)) == before


def test_fixed_parameters_and_several_inputs() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 1).double(), nn.Linear(3, 1).double()
            self.two.requires_grad_(False)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.one(a) + self.two(b)

    model = Sum()
    data = [((x, 2 * x), y) for x, y in environments()]
    losses, params = model_losses(model, data, F.mse_loss)
    assert set(params) == {"one.weight", "one.bias"}
    (a, b), y = data[1]
    torch.testing.assert_close(losses[1](params), F.mse_loss(model(a, b), y))
    assert not any(value.requires_grad for value in params.values())


def test_dropout_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    losses, params = model_losses(model, environments(), F.mse_loss)
    with pytest.raises(ValueError, match=r"losses\[0\]: expected a function of the parameters al"):
        inconsistency_score(losses, params, 0.1)
    losses, params = model_losses(model.eval(), environments(), F.mse_loss)
    assert inconsistency_score(losses, params, 0.1, steps=2).score.isfinite()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((3, [], F.mse_loss), TypeError, "model: expected an nn.Module, but got int"),
        ((nn.Tanh(), [], F.mse_loss), ValueError, "model: expected parameters that need"),
        ((nn.Linear(1, 1), [], 3), TypeError, "loss_fn: expected a callable, but got int"),
        ((nn.Linear(1, 1), [], F.mse_loss), ValueError, "environments: expected at least 1"),
        ((nn.Linear(1, 1), [3], F.mse_loss), TypeError, r"environments\[0\]: expected a pair"),
        ((nn.Linear(1, 1), [(1, 2, 3)], F.mse_loss), TypeError, r"environments\[0\]: expected a"),
    ],
)
def test_errors(arguments: tuple[Any, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        model_losses(*arguments)


def test_losses_of_a_model_want_its_dict() -> None:
    losses, _ = model_losses(nn.Linear(3, 1).double(), environments(), F.mse_loss)
    with pytest.raises(TypeError, match="params: expected the dict of model_losses"):
        inconsistency_score(losses, point(4), 0.1)


# ---- errors of the score ----


def bowl(x: Tensor) -> Tensor:
    return x @ x / 2


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"losses": 3}, TypeError, "losses: expected a sequence of callables.*but got int"),
        ({"losses": [bowl, 3]}, TypeError, r"losses\[1\]: expected a callable .* but got int"),
        ({"losses": 3}, TypeError, "losses: expected a sequence of callables .* but got int"),
        ({"losses": [bowl]}, ValueError, "losses: expected at least 2 environments, but got 1"),
        (
            {"losses": [bowl, lambda x: x]},
            ValueError,
            r"losses\[1\]: expected a 0-dim.*shape \[2\]",
        ),
        (
            {"losses": [bowl, lambda x: 1.0]},
            TypeError,
            r"losses\[1\]: expected a 0-dim.*got float",
        ),
        (
            {"losses": [bowl, lambda x: x.sum() / 0]},
            ValueError,
            r"losses\[1\]: expected a finite",
        ),
        ({"params": 3}, TypeError, "params: expected a Tensor or a dict of Tensors, but got int"),
        ({"params": {"a": 3}}, TypeError, "params: expected a dict from str to Tensor.*int at 'a'"),
        (
            {"params": torch.zeros(0)},
            ValueError,
            "params: expected at least 1 number, but got none",
        ),
        ({"params": torch.zeros(2).half()}, TypeError, "params: expected dtype float32 or float64"),
        (
            {"params": {"a": torch.zeros(2), "b": torch.zeros(2, dtype=F64)}},
            ValueError,
            "params: expected one dtype and one device, but got float32 on.*float64",
        ),
        ({"eps": 0}, ValueError, "eps: expected a positive finite number, but got 0"),
        ({"eps": "a"}, TypeError, "eps: expected a positive finite number, but got str"),
        ({"eps": math.inf}, ValueError, "eps: expected a positive finite number, but got inf"),
        ({"method": "fast"}, ValueError, "method: expected one of auto, quadratic, diagonal, sear"),
        ({"probes": 1}, ValueError, "probes: expected at least 2, but got 1"),
        ({"starts": 0}, ValueError, "starts: expected at least 1, but got 0"),
        ({"steps": True}, TypeError, "steps: expected an int, but got bool"),
        ({"checks": 0.5}, TypeError, "checks: expected an int, but got float"),
        ({"rtol": 1}, ValueError, r"rtol: expected a number in \[0, 1\), but got 1"),
        ({"generator": 3}, TypeError, "generator: expected a torch.Generator or None, but got int"),
        ({"progress": 3}, TypeError, "progress: expected a callable, but got int"),
    ],
)
def test_errors_of_the_score(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"losses": [bowl, bowl], "params": point(2), "eps": 0.1}
    with pytest.raises(kind, match=message):
        inconsistency_score(**{**arguments, **options})


def test_eps_below_rounding_is_an_error() -> None:
    losses = quadratic_losses([np.eye(2), np.eye(2)], torch.float32)
    shifted = [lambda x: losses[0](x) + 1000, losses[1]]
    with pytest.raises(ValueError, match=r"eps: expected at least 0\.0019, as losses\[0\] is 1000"):
        inconsistency_score(shifted, point(2, torch.float32), 1e-3)


def test_errors_of_the_diagonals() -> None:
    with pytest.raises(ValueError, match="probes: expected at least 2, but got 1"):
        hessian_diagonals([bowl, bowl], point(2), probes=1)
    with pytest.raises(TypeError, match="generator: expected a torch"):
        hessian_diagonals([bowl, bowl], point(2), generator=0)  # type: ignore[arg-type]


def root(x: Tensor) -> Tensor:
    return x.abs().sqrt().sum()


@pytest.mark.parametrize("method", ["quadratic", "diagonal"])
def test_hessian_that_does_not_exist(method: str) -> None:
    with pytest.raises(ValueError, match=r"losses\[1\]: the (Hessian|gradient).* not finite"):
        inconsistency_score([bowl, root], point(2), 0.1, method)
