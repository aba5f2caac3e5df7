"""Rules as aggregators of TorchJD equal those of `am.backward`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am

from .common import needs

needs("torchjd")

from torchjd import autojac  # noqa: E402

from andmask_ext.integrations.torchjd import RuleAggregator, jac_to_grad  # noqa: E402

pytestmark = pytest.mark.no_device

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(12) * 7 % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def losses(net: nn.Module) -> list[Tensor]:
    return [F.cross_entropy(net(X[k::4]), Y[k::4]) for k in range(4)]


def filled() -> nn.Module:
    net = network()
    autojac.backward(losses(net))
    return net


RULES = {
    "and_mask": am.AndMask(0.5), "rescaled": am.AndMask(0.5, rescale=True), "mean": am.rules.Mean(),
    "geometric": am.rules.GeometricMean(0.5), "sand": am.rules.SandMask(tau=0.5, k=1.0),
    "median": am.rules.Median(), "filtering": am.rules.GradientAgreementFiltering(0.9),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_each_parameter_alone(rule: Any) -> None:
    net, expected = filled(), network()
    jac_to_grad(net.parameters(), rule)
    am.backward(losses(expected), rule)
    for param, other in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(param.grad, other.grad)
        assert getattr(param, "jac", None) is None
    autojac.backward(losses(net))
    jac_to_grad(net.parameters(), rule, retain_jac=True)  # it adds up
    for param, other in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(param.grad, 2 * other.grad)
        assert param.jac.shape == (4, *param.shape)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_all_parameters_in_one_matrix(rule: Any) -> None:
    net = filled()
    matrix = torch.cat([param.jac.flatten(1) for param in net.parameters()], 1)
    aggregator = RuleAggregator(rule)
    autojac.jac_to_grad(list(net.parameters()), aggregator)
    found = torch.cat([param.grad.flatten() for param in net.parameters()])
    torch.testing.assert_close(found, rule(matrix))
    assert repr(rule) in repr(aggregator)


def test_coordinates_of_a_matrix_are_those_of_each_parameter_without_rescaling() -> None:
    net, other = filled(), filled()
    autojac.jac_to_grad(list(net.parameters()), RuleAggregator(am.AndMask(0.5)))
    jac_to_grad(other.parameters(), am.AndMask(0.5))
    for param, same in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(param.grad, same.grad)


def test_empty_matrices_and_copies() -> None:
    aggregator = RuleAggregator(am.AndMask(0.5))
    assert copy.deepcopy(aggregator)(torch.zeros(3, 0)).shape == (0,)


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match=r"rule: expected a rule such as .* but got float"):
        RuleAggregator(0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rule: expected a rule such as"):
        jac_to_grad([], 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="but got no tensor"):
        jac_to_grad([], am.AndMask(0.5))
    with pytest.raises(ValueError, match=r"tensors\[0\]: expected a tensor with \.jac"):
        jac_to_grad(network().parameters(), am.AndMask(0.5))
    net = filled()
    other = nn.Linear(3, 1).double()
    autojac.backward([other(X[:, :3]).mean(), other(X[:, 3:]).mean()])
    with pytest.raises(ValueError, match="but got Jacobians of 2, 4 rows"):
        jac_to_grad([*net.parameters(), *other.parameters()], am.AndMask(0.5))
